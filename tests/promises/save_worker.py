"""Run as a process of its own by test_committed_saves: both ranks of a cell are its forks: torch is imported once.

Arguments: a folder, then cells, each `NAME=VALUE of SORA_TEST_SAVE`. A cell saves steps 1, 2 and 3 of sharded tensors
behind a loop of collectives; then, undisturbed, ranks that begin anew load what is there. Each rank
writes what it met to FOLDER/NAME/ROUND-RANK.json.
"""

import importlib
import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.points import VARIABLE
from sora_train.checkpoint.saver import Saver
from sora_train.config.sections.outputs import CheckpointConfig
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World

TIMEOUT = timedelta(seconds=90)


def tensors_of(value: float) -> dict[str, Tensor]:
    """Uneven shards, a replicated tensor, and a plain one."""
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(35.0).reshape(7, 5) + value
    return {
        "model.w": distribute_tensor(whole, mesh, [Shard(0)]),
        "ema.w": distribute_tensor(whole * 2, mesh, [Replicate()]),
        "optim.w.step": torch.tensor(value),
    }


def train(saver: Saver, control: ControlPlane) -> dict[str, Any]:
    """Three saves in quick succession, and a step's exchange again and again between and behind them."""
    said = ""
    steps = 0
    try:
        for step in (1, 2, 3):
            if step == 2:
                os.environ[VARIABLE] = os.environ.get("LATER", "")
            saver.save(step, tensors_of(step), {"step": step})
            ends = time.monotonic() + 0.15
            while control.sum([float(saver.is_busy or time.monotonic() < ends)])[0]:
                control.raise_together(saver.poll())
                steps += 1
                time.sleep(0.001)
            control.raise_together(saver.poll())
        saver.wait()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    return {"said": said, "steps": steps}


def look(folder: Path, control: ControlPlane) -> dict[str, Any]:
    """Load the newest checkpoint of a folder into the shards of another moment."""
    newest = checkpoints.list_checkpoints(folder)[-1]
    tensors = tensors_of(-5.0)
    checkpoints.load(newest, tensors, control)
    step, expected = newest.step, tensors_of(newest.step)
    same = all(
        torch.equal(
            tensor.to_local() if hasattr(tensor, "to_local") else tensor,
            expected[name].to_local() if hasattr(tensor, "to_local") else expected[name],
        )
        for name, tensor in tensors.items()
    )
    return {"newest": step, "same": same, "state": newest.state()["step"]}


def rank_main(folder: Path, rank: int, number: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    world = World(rank, 2, rank, 2, torch.device("cpu"))
    control = ControlPlane(world, TIMEOUT)
    saver = Saver(folder / "checkpoints", CheckpointConfig(keep_last=5), world, TIMEOUT)
    found = train(saver, control) if number == 0 else look(saver.folder, control)
    (folder / f"{number}-{rank}.json").write_text(json.dumps(found))


def start(folder: Path, later: str, number: int) -> list[int]:
    """Fork both ranks and wait for them; returns their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                os.environ.update(RANK=str(rank), WORLD_SIZE="2", LATER=later)
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                rank_main(folder, rank, number)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main() -> None:
    # DTensor's operations import it when they are first met, which every fork would do anew.
    importlib.import_module("torch._dynamo")
    folder, *cells = sys.argv[1:]
    for cell in cells:
        name, _, later = cell.partition("=")
        place = Path(folder) / name
        place.mkdir()
        began = time.monotonic()
        codes = start(place, later, 0)
        seconds = time.monotonic() - began
        after = start(place, "", 1)
        found = {"codes": codes, "seconds": seconds, "after": after}
        (place / "codes.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
