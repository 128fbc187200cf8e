"""`sora bench data`: the loader beside the bare decoder and plain webdataset, in one run.

All three decode the clips of the same shards with the same function in the same number of
processes; nobody trains, so what is delivered is what can be delivered. Passes alternate, and each
starts once its processes are busy.
"""

import argparse
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import webdataset_peer
from benchmarks.raw_worker import RawRequest
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.decode.pool import DecodePool
from sora_train.data.index.sources import Sources
from sora_train.data.loader import Loader
from sora_train.data.tape.tape import Tape
from sora_train.errors import UserError
from sora_train.models.vae.autoencoder import read_geometry
from sora_train.tools.data.report_plan import DataPlan
from sora_train.tools.measuring import Measured, Result, Stats
from sora_train.training.pipeline.plan import cost_model, memory_cap, plan

DEFAULT_EXPERIMENT = "experiment=quickstart"
DEFAULT_OUT = Path("benchmarks/results")
# A request to the bare decoder: long enough that asking costs nothing, short enough to end together.
RAW_CLIPS = 4
SOAK_SAMPLES = 50


def main(arguments: Sequence[str]) -> int:
    """Run `[overrides] [--clips N] [--repeats N] [--soak N] [--out DIR]`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sora bench data", allow_abbrev=False)
    parser.add_argument("--clips", type=int, default=300, help="clips of a pass")
    parser.add_argument("--repeats", type=int, default=3, help="passes of each contender")
    parser.add_argument("--soak", type=int, default=1000, help="clips over which memory is watched")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder of data.json, data.md"
    )
    options, overrides = parser.parse_known_args(list(arguments))
    path = run(
        overrides,
        clips=options.clips,
        repeats=options.repeats,
        soak=options.soak,
        out=options.out,
    )
    print(f"\n{path.with_suffix('.md').read_text()}\nwrote {path} and {path.with_suffix('.md')}")
    return 0


def run(overrides: list[str], *, clips: int, repeats: int, soak: int, out: Path) -> Path:
    """Measure and write `out`/data.json and data.md; returns the path of the JSON.

    A pass delivers at least `clips` clips, and is made `repeats` times by each contender; `soak`
    clips are read while memory is watched (0: not at all). Without `experiment=` in the Hydra
    `overrides` the clips are the quickstart's.

    Raises:
        UserError: numbers that measure nothing, or a source without a usable clip.
        ConfigError: an override is wrong.
    """
    if clips < 1 or repeats < 1 or soak < 0:
        raise UserError(
            f"--clips {clips} --repeats {repeats} --soak {soak}: measure at least one clip once"
        )
    named = any(override.startswith("experiment=") for override in overrides)
    chosen = [*([] if named else [DEFAULT_EXPERIMENT]), *overrides]
    bench = DataBench.open(compose([*chosen, "tracker=none"]).config)
    memory = bench.soak(soak) if soak else Memory()
    raw, loader, peer, first, up = [], [], [], [], []
    peer_missing = bench.peer_missing()
    with bench.raw_pool() as pool:
        for repeat in range(repeats):
            micro_batches = bench.pass_of(clips, repeat)
            raw.append(bench.raw(pool, micro_batches))
            rate, seconds_up, seconds_first = bench.loader(micro_batches)
            loader.append(rate)
            up.append(seconds_up)
            first.append(seconds_first)
            if not peer_missing:
                peer.append(bench.peer(sum(map(len, bench.rows(micro_batches)))))
    measured = {
        "bare decoder": Measured(Stats.of(raw), "clips/s"),
        "loader": Measured(Stats.of(loader), "clips/s"),
        "loader / bare decoder": Measured(
            Stats.of([100 * a / b for a, b in zip(loader, raw, strict=True)]), "%", "{:.1f}"
        ),
        "processes up": Measured(Stats.of(up), "s"),
        "first micro-batch after that": Measured(Stats.of(first), "s"),
    }
    if peer:
        shares = [100 * a / b for a, b in zip(peer, raw, strict=True)]
        measured["webdataset"] = Measured(Stats.of(peer), "clips/s")
        measured["webdataset / bare decoder"] = Measured(Stats.of(shares), "%", "{:.1f}")
    facts = bench.facts() | {"overrides": " ".join(chosen), "clips a pass, at least": clips}
    if peer_missing:
        facts["webdataset"] = f"left out: {peer_missing}"
    return Result("data", measured | memory.measured(), facts | memory.facts(soak)).write(Path(out))


@dataclass
class Memory:
    """Resident bytes of this process and of its children, as clips went by."""

    own: list[int] = field(default_factory=list)
    children: list[int] = field(default_factory=list)

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


@dataclass(frozen=True)
class DataBench:
    """The clips to be read, planned as a run would, and the contenders that read them."""

    cfg: Config
    sources: DataPlan
    tape: Tape

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

    def raw_pool(self) -> DecodePool:
        """The bare decoder's processes."""
        deadline = RAW_CLIPS * self.cfg.data.decode_timeout
        program = "raw_torchcodec_worker" if self.cfg.data.decoder == "torchcodec" else "raw_worker"
        return DecodePool(self.cfg.data.num_workers, deadline, module=f"benchmarks.{program}")

    def pass_of(self, clips: int, repeat: int) -> range:
        """The micro-batches of a pass: as many as hold `clips` clips, other ones each time."""
        begin = self.warm
        for _ in range(repeat + 1):
            end, found = begin, 0
            while found < clips:
                found += len(self.tape[end].rows)
                end += 1
            begin, last = end, range(begin, end)
        return last

    @property
    def warm(self) -> int:
        """Micro-batches before a pass, after which as much is read ahead as ever will be."""
        return 2 * self.cfg.data.prefetch

    def rows(self, micro_batches: range) -> list[tuple[int, ...]]:
        return [self.tape[index].rows for index in micro_batches]

    def raw(self, pool: DecodePool, micro_batches: range) -> float:
        """Clips a second of the bare decoder."""
        with self.open_loader() as loader:  # for its requests; its processes are never started
            requests = [
                loader.request(row, epoch)
                for index in micro_batches
                for row, epoch in zip(self.tape[index].rows, self.tape[index].epochs, strict=True)
            ]
        portions = [
            RawRequest(0, "bench", tuple(requests[at : at + RAW_CLIPS]))
            for at in range(0, len(requests), RAW_CLIPS)
        ]
        # Both the processes and the files are warm afterwards.
        for future in [pool.submit(portion) for portion in portions[: self.cfg.data.num_workers]]:
            future.result()
        began = time.perf_counter()
        for future in [pool.submit(portion) for portion in portions]:
            future.result()
        return len(requests) / (time.perf_counter() - began)

    def loader(self, micro_batches: range) -> tuple[float, float, float]:
        """Clips a second; seconds until the processes are up, and from there to a first micro-batch."""
        with self.open_loader() as loader:
            begin = micro_batches.start - self.warm
            began = time.perf_counter()
            loader.decode_rows(self.tape[begin].rows[:1] * self.cfg.data.num_workers)
            up = time.perf_counter()
            loader.step(begin)
            first = time.perf_counter()
            for index in range(begin + 1, micro_batches.start):
                loader.step(index)
            clips, start = 0, time.perf_counter()
            for index in micro_batches:
                clips += len(self.tape[index].rows)
                loader.step(index)
            seconds = time.perf_counter() - start
        return clips / seconds, up - began, first - up

    def peer_missing(self) -> str:
        """Why plain webdataset cannot read the source; empty where it can."""
        return webdataset_peer.missing(self.sources.manifest)

    def peer(self, clips: int) -> float:
        """Clips a second of plain webdataset."""
        with self.open_loader() as loader:
            requests = {
                str(self.sources.manifest.key[row]): loader.request(row, 0)
                for row in self.tape.rows.tolist()
            }
        return webdataset_peer.rate(
            self.sources.manifest, requests, clips=clips, workers=self.cfg.data.num_workers
        )

    def soak(self, clips: int) -> Memory:
        """Memory while the loader delivers `clips` clips."""
        memory, every = Memory(), max(1, clips // SOAK_SAMPLES)
        seen, due = 0, every
        with self.open_loader() as loader:
            for index in itertools.count():
                seen += len(self.tape[index].rows)
                loader.step(index)
                if seen >= due:
                    due += every
                    found = resident()
                    if found is not None:
                        memory.own.append(found[0])
                        memory.children.append(found[1])
                if seen >= clips:
                    return memory
        raise AssertionError("the tape is endless")

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
