"""How fast ranks exchange data: all-reduce, all-to-all, and each rank with its neighbours.

Measured in a fork of each rank, made before anything talked to a GPU, so that a hanging collective hangs nobody
else. Bandwidths are those of nccl-tests (doc/PERFORMANCE.md there): algbw = bytes / seconds, of a rank's buffer;
busbw = algbw * 2 (n-1) / n of an all-reduce and algbw * (n-1) / n of an all-to-all, what a link carries.
"""

import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from sora_train.tools.doctor.findings import FAIL, INFO, WARN, Finding, info

MIB = 2**20
SIZES = {"gloo": (1 * MIB, 8 * MIB, 32 * MIB), "nccl": (1 * MIB, 32 * MIB, 256 * MIB)}
"""Bytes of a rank's buffer, by what carries it."""
ITERATIONS, WARM = 4, 1
NEIGHBOURS = "neighbours"
EXPECTED = {
    "nccl": "about what busbw to expect: NVLink 4 some 350 GB/s in a node, PCIe 4 x16 some 20; between nodes what "
    "their network carries: 45 GB/s for each 400 Gbit/s of InfiniBand, 1 for each 10 Gbit/s of Ethernet",
    "gloo": "gloo on CPUs: some GB/s within a machine, and between nodes at most what TCP carries, 1 GB/s for each "
    "10 Gbit/s",
}
SLOW = 0.5
"""Share of the median below which a rank's links count as slow."""


def busbw(kind: str, nbytes: float, seconds: float, ranks: int) -> float:
    """Bytes a second over a link."""
    share = {"all-reduce": 2 * (ranks - 1) / ranks, "all-to-all": (ranks - 1) / ranks}
    return nbytes / seconds * share.get(kind, 1.0)


class Measuring:
    """A fork of this process that measures on request."""

    def __init__(self) -> None:
        self._end, child = multiprocessing.Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            self._end.close()
            _serve(child)
        child.close()

    def run(self, device_name: str, seconds: float) -> dict[str, Any]:
        """`rows` of kind, bytes and seconds; and `error` where it did not end well, or not in time."""
        ends = time.monotonic() + seconds
        measured: dict[str, Any] = {"rows": [], "backend": "", "error": ""}
        self._end.send((device_name, seconds))
        while self._end.poll(max(0.0, ends - time.monotonic())):
            try:
                message = self._end.recv()
            except EOFError:
                return measured | {"error": "its process ended without an answer"}
            if message.get("done"):
                return measured
            measured["rows"] += message.pop("rows", [])
            measured |= message
            if measured["error"]:
                return measured
        where = ", ranks did not meet"
        if measured["rows"]:
            last = measured["rows"][-1]
            where = f" after {last['kind']} of {last['bytes'] // MIB} MiB"
        return measured | {"error": f"no answer within {seconds:g} s{where}"}

    def end(self) -> None:
        os.kill(self._pid, signal.SIGKILL)
        # Not waited for: a process that a driver holds does not even die.
        os.waitpid(self._pid, os.WNOHANG)


def _serve(end: Connection) -> None:
    """The main loop of the fork."""
    try:
        device_name, seconds = end.recv()
        # The system ends it when the one that waits has long gone.
        signal.alarm(int(seconds) + 30)
        measure(device_name, seconds, end.send)
        end.send({"done": True})
    except EOFError:
        os._exit(0)
    except Exception as error:
        end.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"})
    finally:
        os._exit(0)


def measure(device_name: str, seconds: float, send: Callable[[dict[str, Any]], None]) -> None:
    """Meet the other ranks and measure; they decide together when there is no time for a larger size."""
    import torch
    import torch.distributed as dist

    from sora_train.runtime.world import pick_device
    from sora_train.tools.doctor.nodes.board import attempt

    began = time.monotonic()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = pick_device(device_name, int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience = timedelta(seconds=seconds)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    shared = dist.TCPStore(address, port, timeout=patience, wait_for_workers=False)
    store = dist.PrefixStore(f"doctor/bandwidth/{attempt()}", shared)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=patience)
    send({"backend": backend})
    for nbytes in SIZES[backend]:
        buffer = torch.ones(nbytes // (4 * ranks) * ranks, device=device)
        other = torch.empty_like(buffer)
        for kind, work in collectives(buffer, other, rank, ranks).items():
            taken = timed(work, device)
            send({"rows": [{"kind": kind, "bytes": buffer.numel() * 4, "seconds": taken}]})
        spent = torch.tensor([time.monotonic() - began], device=device)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        if spent.item() > 0.4 * seconds:
            break
    dist.destroy_process_group()


def collectives(buffer: Any, other: Any, rank: int, ranks: int) -> dict[str, Callable[[], None]]:
    """The measured collectives, by name."""
    import torch.distributed as dist

    def neighbours() -> None:
        sent = dist.P2POp(dist.isend, buffer, (rank + 1) % ranks)
        received = dist.P2POp(dist.irecv, other, (rank - 1) % ranks)
        for request in dist.batch_isend_irecv([sent, received]):
            request.wait()

    return {
        "all-reduce": lambda: dist.all_reduce(buffer, op=dist.ReduceOp.MAX) and None,
        "all-to-all": lambda: dist.all_to_all_single(other, buffer) and None,
        NEIGHBOURS: neighbours,
    }


def timed(work: Callable[[], None], device: Any) -> float:
    """Seconds of one call, when all ranks begin together."""
    import torch
    import torch.distributed as dist

    for _ in range(WARM):
        work()
    dist.barrier()
    began = time.perf_counter()
    for _ in range(ITERATIONS):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / ITERATIONS


# -- judging --------------------------------------------------------------------------------------


def judge(measured: dict[int, dict[str, Any]], names: dict[int, str]) -> list[Finding]:
    """`measured` by rank, and the name of each rank's node."""
    ranks = len(names)
    errors = {rank: measured[rank]["error"] if rank in measured else "no answer" for rank in names}
    remedy = (
        "the collective of this rank broke or hung: look at what fails above for its node, then NCCL_DEBUG=INFO "
        "(GLOO: TORCH_CPP_LOG_LEVEL=INFO) in a run of `sora doctor` alone"
    )
    failed = [(rank, error) for rank, error in errors.items() if error]
    lines = [
        Finding(f"bandwidth: rank {rank} on {names[rank]}", error, FAIL, remedy)
        for rank, error in failed[:8]
    ]
    whole = {rank: result["rows"] for rank, result in measured.items() if result["rows"]}
    if len(whole) < ranks:
        return lines
    length = min(len(rows) for rows in whole.values())
    for place in range(length):
        rows = [whole[rank][place] for rank in sorted(whole)]
        if rows[0]["kind"] != NEIGHBOURS:
            lines.append(_row(rows, ranks))
    backend = next(iter(measured.values()))["backend"]
    lines.append(info("bandwidth expected", EXPECTED.get(backend, backend)))
    last = [
        [row for row in whole[rank][:length] if row["kind"] == NEIGHBOURS][-1:]
        for rank in sorted(whole)
    ]
    if all(last):
        lines += _slow([row[0]["bytes"] / row[0]["seconds"] for row in last], names)
    return lines


def _row(rows: list[dict[str, Any]], ranks: int) -> Finding:
    kind, nbytes = rows[0]["kind"], rows[0]["bytes"]
    slowest = max(row["seconds"] for row in rows)
    name = f"{kind} of {nbytes / MIB:.0f} MiB"
    value = f"algbw {nbytes / slowest / 1e9:.2f} GB/s, busbw {busbw(kind, nbytes, slowest, ranks) / 1e9:.2f} GB/s"
    return Finding(name, f"{value}, {slowest * 1e3:.1f} ms over {ranks} ranks", INFO)


def slow_ranks(received: list[float]) -> list[int]:
    """Ranks whose links both ways are slow. `received` is what rank r gets from r-1; that of r+1 tells how r sends.

    Of fewer than four ranks nobody can say which of two is slow.
    """
    ranks = len(received)
    if ranks < 4:
        return []
    usual = statistics.median(received) * SLOW
    return [
        rank
        for rank in range(ranks)
        if received[rank] < usual and received[(rank + 1) % ranks] < usual
    ]


def _slow(received: list[float], names: dict[int, str]) -> list[Finding]:
    median, slow = statistics.median(received), slow_ranks(received)
    low = min(range(len(received)), key=received.__getitem__)
    previous = (low - 1) % len(received)
    least = f"least {received[low] / 1e9:.2f} from {previous} to {low}"
    value = f"{median / 1e9:.2f} GB/s from the rank before (median), {least}"
    remedy = "all ranks wait for it: look at its node's GPUs, PCIe and network, or leave it out (launch.exclude)"
    slower = "its links are less than half as fast as others'"
    return [
        info(NEIGHBOURS, value),
        *(Finding(f"rank {rank} on {names[rank]}", slower, WARN, remedy) for rank in slow),
    ]
