"""Planned against measured: the most bytes of tensors that are alive in a training step, layout by layout.

    python benchmarks/plan_memory.py --out benchmarks/plan.md

Each cell is a run of the Trainer on real processes on the CPU, its tensors counted from the operators
that make them; beside it stands what `memory_of` says of the same config. Both count alike, the plan
on fake tensors of the first rank and the run on real ones of every rank, of which the fullest counts.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
BASE = (
    "experiment=parity_tiny", "tracker=none", "model.num_layers=6", "model.num_heads=4",
    "model.head_dim=64", "model.ffn_dim=1024", "model.text_dim=64", "text.trainable=false",
    "optim=adamw", "data.micro_batch=3", "data.cache=none", "data.shapes_image_share=0.0",
    "objective.conditioning.i2v=0.0", "train.steps=3", "validation.every=0", "sample.every=0",
    "checkpoint.every=0", "parallel.self_test=false", "run.device=cpu",
    "buckets.classes=[{name: 64px, pixels: 4096, frames: [9], aspect_ratios: ['1:1']}]",
    "text.max_length=48", "model.compile=off", "buckets.max_upscale=4",
)  # fmt: skip
BUCKET, CLIPS = (9, 64, 64), 3
SMALL_BUCKETS = {
    "zero_optimization": {
        "reduce_bucket_size": 500_000, "allgather_bucket_size": 500_000,
        "stage3_prefetch_bucket_size": 200_000, "stage3_param_persistence_threshold": 10_000,
    }
}  # fmt: skip
"""DeepSpeed's usual buckets hold any model of this size several times over."""
LAYOUTS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "single": (1, ("parallel=single",), ("none",)),
    "fsdp x2": (2, ("parallel=fsdp",), ("none", "full", "selective")),
    "ulysses 2": (2, ("parallel=fsdp", "parallel.ulysses=2"), ("none",)),
    "ring 2": (2, ("parallel=fsdp", "parallel.ring=2"), ("none",)),
    "zero1 x2": (2, ("parallel=zero1",), ("none",)),
    "zero2 x2": (2, ("parallel=zero2",), ("none", "full")),
    "zero3 x2": (2, ("parallel=zero3",), ("none", "selective")),
    "fsdp x4": (4, ("parallel=fsdp",), ("none", "full")),
    "hsdp 2x2": (
        4, ("parallel=hsdp", "parallel.dp_replicate=2", "parallel.dp_shard=2"), ("selective",),
    ),
    "zero1 x4": (4, ("parallel=zero1",), ("none",)),
    "zero2 x4": (4, ("parallel=zero2",), ("none",)),
    "zero3 x4": (4, ("parallel=zero3",), ("none",)),
    "adapter": (1, ("parallel=single",), ("none", "full")),
    "adapter, int8": (1, ("parallel=single", "memory.base=int8"), ("none",)),
    "adapter, nf4, swapped": (
        1, ("parallel=single", "memory.base=nf4", "memory.swap_blocks=4"), ("full",),
    ),
    "adapter, nf4, fsdp x2": (2, ("parallel=fsdp", "memory.base=nf4"), ("none",)),
}  # fmt: skip
"""Layout -> ranks, overrides, kinds of checkpointing."""
ADAPTER = ("adapter.rank=16", "adapter.targets=[attention+mlp]")
"""Of the layouts that are called so; their base is an untrained run."""


@dataclass(frozen=True)
class Cell:
    """A row of the table."""

    layout: str
    checkpointing: str
    world: int
    overrides: tuple[str, ...]


def cells() -> list[Cell]:
    """All rows."""
    return [
        Cell(name, kind, world, (*own, f"parallel.activation_checkpointing={kind}"))
        for name, (world, own, kinds) in LAYOUTS.items()
        for kind in kinds
    ]


def chosen(cell: Cell, folder: Path) -> list[str]:
    """All overrides of a cell."""
    found = [*BASE, *cell.overrides, f"train.micro_batches={cell.world}"]
    if "adapter" in cell.layout:
        found += [*ADAPTER, f"init.run={folder / 'base'}"]
    if "zero" in cell.layout:
        path = folder / "deepspeed.json"
        path.write_text(json.dumps(SMALL_BUCKETS))
        found.append(f"parallel.deepspeed_json={path}")
    return found


def measure(group: list[Cell], folder: Path, seconds: float = 1800) -> list[dict[str, int]]:
    """The peak of the fullest rank of each cell, all of one world size, in one launch."""
    asked = [
        [*chosen(cell, folder), f"run.dir={folder / f'run-{n}'}"] for n, cell in enumerate(group)
    ]
    if any("adapter" in cell.layout for cell in group):
        train_base(folder / "base")
    world = group[0].world
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}",
        "--master-addr=127.0.0.1", f"--master-port={port}", __file__, "--measure", str(folder),
    ]  # fmt: skip
    (folder / "asked.json").write_text(json.dumps(asked))
    path = os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        command, check=False, env=env, timeout=seconds, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(
            f"the measured runs failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    ranks = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(world)]
    return [max(found, key=lambda one: one["peak"]) for found in zip(*ranks, strict=True)]


def train_base(folder: Path) -> None:
    """A run of one step, whose weights adapters are trained beside."""
    command = [
        sys.executable,
        "-m",
        "sora_train",
        "train",
        *BASE,
        "train.steps=1",
        "parallel=single",
    ]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    subprocess.run([*command, f"run.dir={folder}"], check=True, env=env, capture_output=True)


def measured_here(folder: Path) -> None:
    """One rank of the launch: train cell after cell, counting."""
    import torch.distributed as dist

    from sora_train.config.compose import compose
    from sora_train.tools.plan.memory.count import Held
    from sora_train.training.trainer import Trainer

    # One rank makes a group of its own for each run.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    found = []
    for overrides in json.loads((folder / "asked.json").read_text()):
        cfg = compose(overrides).config
        with Held() as held:
            trainer = Trainer(cfg)
            # The first step makes what lasts; nothing of a run but its steps is counted.
            trainer.train_step()
            swapper = getattr(trainer.engine, "swapper", None)
            for block in swapper.swapped if swapper else ():
                held.mark(block.hosts, "host")
            held.during("step")
            trainer.train_step()
            held.during("")
            found.append({"peak": sum(held.peaks["step"].values())})
            trainer.close()
            del trainer
    rank = os.environ.get("RANK", "0")
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.destroy_process_group()


def planned(cell: Cell, folder: Path) -> dict[str, int | str]:
    """What the plan says of a cell."""
    from dataclasses import asdict

    from sora_train.config.compose import compose
    from sora_train.data.sample import Bucket
    from sora_train.tools.plan.memory.plan import memory_of

    cfg = compose(chosen(cell, folder)).config
    return asdict(memory_of(cfg, cell.world, Bucket(*BUCKET), CLIPS, device="cpu"))


def compared(group: list[Cell], folder: Path) -> list[tuple[Cell, dict[str, int | str], int]]:
    """(cell, plan, measured bytes) of each cell."""
    found = []
    for world in sorted({cell.world for cell in group}):
        own = [cell for cell in group if cell.world == world]
        inside = folder / f"world-{world}"
        inside.mkdir()
        peaks = measure(own, inside)
        found += [
            (cell, planned(cell, inside), peak["peak"])
            for cell, peak in zip(own, peaks, strict=True)
        ]
    return found


def table(rows: list[tuple[Cell, dict[str, int | str], int]], command: str) -> str:
    """The page, in Markdown."""
    from sora_train.base.code_version import commit

    worst = max(abs(int(plan["peak"]) / peak - 1) for _, plan, peak in rows)
    lines = [
        "# Planned and measured memory", "",
        f"`{command}`, commit {commit()}, {os.cpu_count()}-core {platform.machine()}, CPU runs over gloo, float32.",
        "", f"Worst difference {100 * worst:.1f} % (5 % allowed). MiB of the fullest rank.", "",
        "| layout | checkpointing | measured | planned | off by | at | weights | gradients | moments | EMA |"
        " activations | buffers | encoders |",
        "|---|---|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    names = ("weights", "gradients", "optimizer", "ema", "activations", "buffers", "encoders")
    for cell, plan, peak in rows:
        parts = " | ".join(f"{int(plan[name]) / 2**20:.1f}" for name in names)
        lines.append(
            f"| {cell.layout} | {cell.checkpointing} | {peak / 2**20:.1f} | {int(plan['peak']) / 2**20:.1f} | "
            f"{100 * (int(plan['peak']) / peak - 1):+.1f} % | {plan['when']} | {parts} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/plan.md"))
    parser.add_argument("--only", default="", help="layouts whose name contains this")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measured_here(options.measure)
        return 0
    group = [cell for cell in cells() if options.only in cell.layout]
    with tempfile.TemporaryDirectory() as folder:
        rows = compared(group, Path(folder))
    page = table(rows, f"python benchmarks/plan_memory.py --out {options.out}")
    options.out.write_text(page)
    print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
