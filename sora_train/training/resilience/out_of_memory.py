"""Out of memory: what was being computed, in what layout, and what the memory held, in a file and one sentence.

No rank skips a micro-batch that does not fit: the others would wait for it in a collective, and the
step would train on other clips. The rank that ran out writes RUN/oom/rank-R.json and stops with a Fault, and
the run with it.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sora_train.config import Config
from sora_train.data.sample import ClipBatch
from sora_train.errors import Fault
from sora_train.runtime.world import World

SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "failed to allocate")
"""What allocators say that raise a plain RuntimeError (`DefaultCPUAllocator: can't allocate memory`)."""
MOST_EVENTS = 100_000
"""Allocations and frees kept for the snapshot, the newest."""
GB = 1e9


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def record_allocations(cfg: Config, world: World) -> None:
    """Keep the history that the allocator's snapshot shows, where `run.memory_history` asks for it."""
    if cfg.run.memory_history and world.device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)


@dataclass(frozen=True)
class Work:
    """What a rank is doing: which step, what of it, the micro-batch and its size."""

    step: int
    doing: str
    batch: ClipBatch
    tokens: int
    """Video tokens of a clip."""


@contextlib.contextmanager
def explained(work: Work, cfg: Config, world: World) -> Iterator[None]:
    """Raises Fault instead of what the allocator raises inside the block."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise explain(error, work, cfg, world) from error


def explain(error: BaseException, work: Work, cfg: Config, world: World) -> Fault:
    """Write RUN/oom/rank-R.json, and on a GPU the allocator's snapshot; the sentence that says it."""
    bucket, clips = work.batch.micro_batch.bucket, max(1, len(work.batch.clips))
    memory = memory_now(world.device)
    folder = Path(cfg.run.dir) / "oom"
    report = {
        "step": work.step,
        "doing": work.doing,
        "rank": world.rank,
        "bucket": bucket.name,
        "shape": {
            "clips": clips,
            "frames": bucket.frames,
            "height": bucket.height,
            "width": bucket.width,
        },
        "tokens": clips * work.tokens,
        "micro_batch": work.batch.micro_batch.index,
        "rows": list(work.batch.micro_batch.rows),
        "layout": layout(cfg, world),
        "memory": memory,
        "error": " ".join(str(error).split()),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"rank-{world.rank}.json"
        if cfg.run.memory_history and world.device.type == "cuda":
            snapshot = folder / f"rank-{world.rank}.snapshot.pickle"
            torch.cuda.memory._dump_snapshot(str(snapshot))
            report["snapshot"] = str(snapshot)
        file.write_text(json.dumps(report, indent=1))
        where = f"; see {file}"
    except OSError as failure:
        where = f"; {folder} cannot be written ({failure.strerror})"
    held = ", ".join(f"{name} {value / GB:.3g} GB" for name, value in memory.items())
    return Fault(
        f"out of memory in {work.doing} of step {work.step} on rank {world.rank} of {world.size}: {clips} clip(s) "
        f"of bucket {bucket.name} ({clips * work.tokens:,} tokens), dp_replicate={cfg.parallel.dp_replicate} "
        f"dp_shard={cfg.parallel.dp_shard} ulysses={cfg.parallel.ulysses} "
        f"ring={cfg.parallel.ring} data.micro_batch={cfg.data.micro_batch}; {held}; {remedy(cfg)}{where}"
    )


def layout(cfg: Config, world: World) -> dict[str, Any]:
    return {
        "world_size": world.size,
        "ranks_per_node": world.ranks_per_node,
        "device": str(world.device),
        **cfg.parallel.model_dump(),
        "data.micro_batch": cfg.data.micro_batch,
        "data.micro_batch_tokens": cfg.data.micro_batch_tokens,
        "data.memory_gb": cfg.data.memory_gb,
        "train.micro_batches": cfg.train.micro_batches,
    }


def remedy(cfg: Config) -> str:
    if cfg.data.memory_gb:
        return f"lower data.memory_gb (it is {cfg.data.memory_gb:g}), leave the bucket out, or raise parallel.dp_shard"
    return (
        "set data.memory_gb, which bounds every micro-batch by the memory it is predicted to take, lower "
        "data.micro_batch, or leave the bucket out"
    )


def memory_now(device: torch.device) -> dict[str, int]:
    """Bytes: of the allocator and the device on a GPU, and of this process and its machine."""
    memory: dict[str, int] = {}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory = {
            "allocated": torch.cuda.memory_allocated(device),
            "most allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "free on the device": free,
            "of": total,
        }
    for name, file, field in (
        ("resident", "/proc/self/status", "VmRSS:"),
        ("free in the machine", "/proc/meminfo", "MemAvailable:"),
    ):
        value = kilobytes(Path(file), field)
        if value is not None:
            memory[name] = value
    return memory


def kilobytes(file: Path, field: str) -> int | None:
    """Bytes of a `Field:  123 kB` line of a file under /proc; None where there is none."""
    if not file.exists():
        return None
    for line in file.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None
