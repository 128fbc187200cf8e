"""`sora bench data`: the loader beside the bare decoder and plain webdataset, in one run.

All three decode the clips of the same shards with the same function in the same number of
processes; nobody trains, so what is delivered is what can be delivered. They take turns, and the
bare decoder gets the very clips that the loader's processes decoded in its turn: a turn of the loader
begins and ends with everything read ahead, so it delivers as many clips as it decodes. Turns end by
the clock, and what is measured so far is written after each.
"""

import argparse
import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from benchmarks import webdataset_peer
from benchmarks.raw_worker import RawRequest
from sora_train.base.progress import Progress
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.decode.frames import DecodeRequest
from sora_train.data.decode.pool import DecodePool
from sora_train.data.index.sources import Sources
from sora_train.data.loader import Loader
from sora_train.data.tape.tape import Tape
from sora_train.device.measuring import Measured, Result, Stats
from sora_train.errors import UserError
from sora_train.models.vae.autoencoder import read_geometry
from sora_train.tools.data.report_plan import DataPlan
from sora_train.training.pipeline.plan import cost_model, memory_cap, plan

DEFAULT_EXPERIMENT = "experiment=quickstart"
DEFAULT_OUT = Path("benchmarks/results")
SECONDS, QUICK_SECONDS = 90.0, 30.0
# Of a turn, at least.
LEAST_SECONDS = 0.1
# The part of the time in which memory is watched.
SOAK_SHARE = 0.2
# Light clips in a request to the bare decoder: enough that asking costs nothing.
RAW_CLIPS = 4
SOAK_SAMPLES = 50


@dataclass(frozen=True)
class Effort:
    """How much is measured: at most `clips` a turn, `repeats` turns of each contender, memory over `soak` clips, all
    in about `seconds`, in which the source is indexed too."""

    clips: int = 1000
    repeats: int = 3
    soak: int = 1000
    seconds: float = SECONDS

    def __post_init__(self) -> None:
        if self.clips < 1 or self.repeats < 1 or self.soak < 0 or self.seconds <= 0:
            raise UserError(
                f"--clips {self.clips} --repeats {self.repeats} --soak {self.soak} --seconds {self.seconds:g}: measure "
                "at least one clip once"
            )


def main(arguments: Sequence[str]) -> int:
    """Run `[overrides] [--clips N] [--repeats N] [--soak N] [--seconds S] [--quick] [--out DIR]`; the exit code."""
    parser = argparse.ArgumentParser(prog="sora bench data", allow_abbrev=False)
    plain = Effort()
    parser.add_argument("--clips", type=int, default=plain.clips, help="most clips of a turn")
    parser.add_argument(
        "--repeats", type=int, default=plain.repeats, help="turns of each contender"
    )
    parser.add_argument(
        "--soak", type=int, default=plain.soak, help="most clips over which memory is watched"
    )
    parser.add_argument("--seconds", type=float, default=plain.seconds, help="seconds in all")
    parser.add_argument(
        "--quick", action="store_true", help=f"in {QUICK_SECONDS:g} seconds, without the memory"
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder of data.json, data.md"
    )
    options, overrides = parser.parse_known_args(list(arguments))
    effort = Effort(options.clips, options.repeats, options.soak, options.seconds)
    if options.quick:
        effort = replace(effort, soak=0, seconds=min(effort.seconds, QUICK_SECONDS))
    path = run(overrides, effort, out=options.out)
    print(f"\n{path.with_suffix('.md').read_text()}\nwrote {path} and {path.with_suffix('.md')}")
    return 0


def run(overrides: list[str], effort: Effort, *, out: Path) -> Path:
    """Measure and write `out`/data.json and data.md; returns the path of the JSON.

    Without `experiment=` in the Hydra `overrides` the clips are the quickstart's. The files are written after
    each round of turns, so what was measured is there whenever the command is ended.

    Raises:
        UserError: a source without a usable clip.
        ConfigError: an override is wrong.
    """
    began = time.monotonic()
    named = any(override.startswith("experiment=") for override in overrides)
    chosen = [*([] if named else [DEFAULT_EXPERIMENT]), *overrides]
    bench = DataBench.open(compose([*chosen, "tracker=none"]).config)
    peer_missing = bench.peer_missing()
    facts = bench.facts() | {"overrides": " ".join(chosen)}
    if peer_missing:
        facts["webdataset"] = f"left out: {peer_missing}"
    contenders = 2 if peer_missing else 3
    ends = began + effort.seconds * (1 - SOAK_SHARE if effort.soak else 1)
    found = Rates()
    with (
        bench.open_loader() as loader,
        bench.raw_pool(loader) as pool,
        Progress(effort.repeats, "turns of each contender", line_seconds=0.0) as progress,
    ):
        found.up, found.first = bench.begin(loader, pool)
        turns = effort.repeats * contenders
        turn = max(LEAST_SECONDS, (ends - time.monotonic()) / turns)
        for repeat in range(effort.repeats):
            round_began = time.monotonic()
            before = core_seconds()
            delivered, seconds, rows = bench.loader_turn(loader, effort.clips, turn)
            found.loader.append(delivered / seconds)
            between = core_seconds()
            found.raw.append(bench.raw_turn(loader, pool, rows))
            if before is not None and between is not None and (after := core_seconds()) is not None:
                spent = (between - before) / max(1, len(rows))
                bare = (after - between) / max(1, len(rows))
                found.loader_cores.append(1e3 * spent)
                found.raw_cores.append(1e3 * bare)
            if not peer_missing:
                found.peer.append(bench.peer(loader, effort.clips, turn))
            path = Result("data", found.measured(), facts).write(Path(out))
            progress.update(repeat + 1, share=f"{found.loader[-1] / found.raw[-1]:.1%}")
            # A round that would not be half done in time is not begun.
            if time.monotonic() + (time.monotonic() - round_began) / 2 > ends:
                break
        if not effort.soak:
            return path
        left = max(LEAST_SECONDS, began + effort.seconds - time.monotonic())
        memory, clips = bench.soak(loader, effort.soak, left)
    facts |= memory.facts(clips)
    return Result("data", found.measured() | memory.measured(), facts).write(Path(out))


@dataclass
class Rates:
    """Clips a second of each contender, turn by turn; ms of cores a clip, to which other programs on the machine add
    little; seconds until processes were up, and to a first micro-batch."""

    loader: list[float] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    loader_cores: list[float] = field(default_factory=list)
    raw_cores: list[float] = field(default_factory=list)
    up: float = 0.0
    first: float = 0.0

    def measured(self) -> dict[str, Measured]:
        rates = {"bare decoder": self.raw, "loader": self.loader, "webdataset": self.peer}
        measured = {
            name: Measured(Stats.of(rate), "clips/s") for name, rate in rates.items() if rate
        }
        for name in [name for name in measured if name != "bare decoder"]:
            shares = [100 * a / b for a, b in zip(rates[name], self.raw, strict=True)]
            measured[f"{name} / bare decoder"] = Measured(Stats.of(shares), "%", "{:.1f}")
        if self.raw_cores:
            bare, ours = self.raw_cores, self.loader_cores
            shares = [100 * a / b for a, b in zip(bare, ours, strict=True)]
            measured["time of cores of the bare decoder"] = Measured(Stats.of(bare), "ms a clip")
            measured["time of cores of the loader"] = Measured(Stats.of(ours), "ms a clip")
            measured["bare decoder / loader, by cores"] = Measured(Stats.of(shares), "%", "{:.1f}")
        measured["processes up"] = Measured(Stats.of([self.up]), "s")
        measured["first micro-batch after that"] = Measured(Stats.of([self.first]), "s")
        return measured


@dataclass
class Memory:
    """Resident bytes of this process and of its children, as clips went by."""

    own: list[int] = field(default_factory=list)
    children: list[int] = field(default_factory=list)

    def look(self) -> None:
        """Add what is resident now, where the system tells."""
        found = resident()
        if found is not None:
            self.own.append(found[0])
            self.children.append(found[1])

    def measured(self) -> dict[str, Measured]:
        if not self.own:
            return {}
        return {
            "RSS of this process": Measured(Stats.of([n / 2**20 for n in self.own]), "MiB"),
            "RSS of its decoders": Measured(Stats.of([n / 2**20 for n in self.children]), "MiB"),
        }

    def facts(self, clips: int) -> dict[str, str | int | float | None]:
        """Growth from the second tenth of the clips to the last."""
        if not self.own:
            return {"clips while memory was watched": clips, "growth of RSS": "not known"}
        total = np.array(self.own, float) + np.array(self.children, float)
        tenth = max(1, len(total) // 10)
        begin, end = total[tenth : 2 * tenth].mean(), total[-tenth:].mean()
        return {
            "clips while memory was watched": clips,
            "growth of RSS, MiB": float(end - begin) / 2**20,
            "growth of RSS, %": 100 * float(end / begin - 1),
        }


@dataclass
class DataBench:
    """The clips to be read, planned as a run would, and the contenders that read them.

    `next_step` is the loader's next micro-batch, `read` the last one that it has read ahead.
    """

    cfg: Config
    sources: DataPlan
    tape: Tape
    next_step: int = 0
    read: int = -1

    @classmethod
    def open(cls, cfg: Config) -> "DataBench":
        """Raises what opening the source does, and UserError where no clip fits a bucket."""
        # What is dropped is not what is measured, and the bare decoder knows clips alone.
        data = cfg.data.model_copy(
            update={"max_drop_fraction": 1.0, "stored_latents": "ignore", "stored_text": "ignore"}
        )
        cfg = cfg.model_copy(update={"data": data})
        sources = DataPlan.open(cfg)
        tokens = {
            spec.bucket: number for spec, number in zip(sources.table, sources.tokens, strict=True)
        }
        memory = memory_cap(cfg, read_geometry(cfg.vae), tokens.__getitem__)
        whole = Sources.of(sources.manifest)
        _, tape, _ = plan(
            cfg, whole, sources.table, tokens.__getitem__, cost_model(cfg), memory=memory
        )
        return cls(cfg, sources, tape.parts[0])

    def open_loader(self) -> Loader:
        """One step is one micro-batch."""
        return Loader(
            self.sources.manifest,
            self.tape,
            self.cfg.buckets,
            self.cfg.data,
            seed=self.cfg.seed,
            micro_batches=1,
            reasons=self.sources.assignment.reasons,
        )

    def raw_pool(self, loader: Loader) -> DecodePool:
        """The bare decoder's processes, for the requests of a loader."""
        deadline = RAW_CLIPS * self.cfg.data.decode_timeout
        program = "raw_torchcodec_worker" if loader.program == "torchcodec" else "raw_worker"
        return DecodePool(self.cfg.data.num_workers, deadline, module=f"benchmarks.{program}")

    def begin(self, loader: Loader, pool: DecodePool) -> tuple[float, float]:
        """Seconds until the loader's processes are up, then to a first micro-batch; all is then read ahead."""
        began = time.perf_counter()
        loader.decode_rows(self.tape[0].rows[:1] * self.cfg.data.num_workers)
        up = time.perf_counter()
        loader.step(0)
        first = time.perf_counter()
        self.next_step = 1
        self.read = max(loader.settle(), 0)
        # The bare decoder's processes are up afterwards.
        light = loader.request(self.tape[0].rows[0], 0)
        for future in [
            pool.submit(RawRequest(0, "bench", (light,))) for _ in range(self.cfg.data.num_workers)
        ]:
            future.result()
        return up - began, first - up

    def loader_turn(
        self, loader: Loader, clips: int, seconds: float
    ) -> tuple[int, float, list[tuple[int, int]]]:
        """Clips delivered, the seconds, and the rows and epochs decoded meanwhile: at least one micro-batch."""
        delivered, began = 0, time.perf_counter()
        while not delivered or (delivered < clips and time.perf_counter() - began < seconds):
            delivered += sum(len(batch.micro_batch.rows) for batch in loader.step(self.next_step))
            self.next_step += 1
        # Where nothing is read ahead, what was delivered is what was decoded.
        read, self.read = self.read, max(loader.settle(), self.next_step - 1)
        spent = time.perf_counter() - began
        entries = [self.tape[index] for index in range(read + 1, self.read + 1)]
        rows = [pair for entry in entries for pair in zip(entry.rows, entry.epochs, strict=True)]
        return delivered, spent, rows

    def raw_turn(self, loader: Loader, pool: DecodePool, rows: list[tuple[int, int]]) -> float:
        """Clips a second of the bare decoder."""
        requests = [loader.request(row, epoch) for row, epoch in rows]
        portions = list(portioned(requests))
        began = time.perf_counter()
        for future in [pool.submit(RawRequest(0, "bench", portion)) for portion in portions]:
            future.result()
        return len(requests) / (time.perf_counter() - began)

    def peer_missing(self) -> str:
        """Why plain webdataset cannot read the source; empty where it can."""
        return webdataset_peer.missing(self.sources.manifest)

    def peer(self, loader: Loader, clips: int, seconds: float) -> float:
        """Clips a second of plain webdataset."""
        requests = {
            str(self.sources.manifest.key[row]): loader.request(row, 0)
            for row in self.tape.rows.tolist()
        }
        return webdataset_peer.rate(
            self.sources.manifest,
            requests,
            clips=clips,
            seconds=seconds,
            workers=self.cfg.data.num_workers,
        )

    def soak(self, loader: Loader, clips: int, seconds: float) -> tuple[Memory, int]:
        """Memory while the loader delivers `clips` clips, or as many as it can in `seconds`; and how many it were."""
        memory, seen, began = Memory(), 0, time.monotonic()
        while seen < clips and (spent := time.monotonic() - began) < seconds:
            if len(memory.own) <= SOAK_SAMPLES * max(seen / clips, spent / seconds):
                memory.look()
            seen += sum(len(batch.micro_batch.rows) for batch in loader.step(self.next_step))
            self.next_step += 1
        memory.look()
        return memory, seen

    def facts(self) -> dict[str, str | int | float | None]:
        used = self.sources.manifest.select(self.sources.used)
        return {
            "source": str(self.cfg.data.source),
            "clips": len(used),
            "codecs": ", ".join(sorted(set(used.codec.tolist()))),
            "buckets": ", ".join(
                f"{spec.bucket.name}: {number}"
                for spec, number in zip(
                    self.sources.table, self.sources.clips_per_bucket, strict=True
                )
                if number
            ),
            "bytes a clip, mean": int(used.length.mean()),
            "decode processes": self.cfg.data.num_workers,
            "micro-batches read ahead": self.cfg.data.prefetch,
            "MB read ahead, at most": self.cfg.data.prefetch_mb,
        }


def portioned(requests: Sequence[DecodeRequest]) -> Iterator[tuple[DecodeRequest, ...]]:
    """The requests in their order: light ones RAW_CLIPS at a time, others alone."""
    for is_light, group in itertools.groupby(requests, key=lambda request: request.is_light):
        together = list(group)
        size = RAW_CLIPS if is_light else 1
        for at in range(0, len(together), size):
            yield tuple(together[at : at + size])


def core_seconds() -> float | None:
    """Seconds of cores that this process and its children have taken; None where /proc is missing."""
    if not Path("/proc/self/statm").exists():
        return None
    ticks = 0
    for pid in _children(os.getpid()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            # utime and stime, after the name in brackets.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def resident() -> tuple[int, int] | None:
    """Resident bytes of this process, and of its children together; None where /proc is missing."""
    if not Path("/proc/self/statm").exists():
        return None
    return _resident(os.getpid()), sum(map(_resident, _children(os.getpid())))


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it has ended
    return pages * os.sysconf("SC_PAGE_SIZE")


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        yield from map(int, (task / "children").read_text().split())
