"""`sora bench ckpt`: how long a save holds up the training, written at once and written behind it.

Both save the same state to the same disk in turns. The first save behind the training is measured on
its own: memory that nobody has touched yet would make it as slow as a save at once.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from sora_train.checkpoint.saver import Saver
from sora_train.checkpoint.space import MIB, bytes_of
from sora_train.config.sections.outputs import CheckpointConfig
from sora_train.device import measuring
from sora_train.device.measuring import Measured, Result, Stats
from sora_train.errors import UserError
from sora_train.runtime.world import World, pick_device, start, stop

DEFAULT_OUT = Path("benchmarks/results")
# The middle of a transformer's block: a matrix of this side, a few vectors beside it.
SIDE, VECTORS = 1024, 6


def main(arguments: Sequence[str]) -> int:
    """Run `[--mib N] [--repeats N] [--device D] [--folder DIR] [--out DIR]`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sora bench ckpt", allow_abbrev=False)
    parser.add_argument(
        "--mib",
        type=int,
        help="size of the state; 512, on a GPU 8192: seconds of its memory's copy",
    )
    parser.add_argument("--repeats", type=int, default=3, help="saves of each kind")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--folder", type=Path, default=Path(), help="where checkpoints are written")
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder of ckpt.json, ckpt.md"
    )
    options = parser.parse_args(list(arguments))
    gpu = pick_device(options.device).type == "cuda"
    path = run(
        mib=options.mib or (8192 if gpu else 512),
        repeats=options.repeats,
        device=options.device,
        folder=options.folder,
        out=options.out,
    )
    print(path.with_suffix(".md").read_text())
    return 0


def run(*, mib: int, repeats: int, device: str, folder: Path, out: Path) -> Path:
    """Save a state of `mib` MiB in turns both ways; write `out`/ckpt.json and ckpt.md.

    Raises:
        UserError: nothing to measure, or the disk has no room for three saves.
    """
    if mib < 8 or repeats < 1:
        raise UserError(f"--mib {mib} --repeats {repeats}: measure at least 8 MiB once")
    free = shutil.disk_usage(folder).free
    if free < 4 * mib * MIB:
        raise UserError(
            f"--folder {folder} has {free / MIB:,.0f} MiB free and needs {4 * mib:,}; name another or lower --mib"
        )
    world = start(device, 0)
    try:
        tensors = a_state(mib, world.device)
        with tempfile.TemporaryDirectory(dir=folder, prefix="bench-ckpt-") as place:
            measured, facts = measure(Path(place), tensors, repeats, world)
    finally:
        stop(world)
    about: dict[str, str | int | float | None] = {
        "state, MiB": round(bytes_of(tensors) / MIB),
        "tensors": len(tensors),
        **facts,
    }
    return Result("ckpt", measured, about).write(Path(out))


def a_state(mib: int, device: torch.device) -> dict[str, Tensor]:
    """Weights, both moments and the average of a model of matrices and vectors, float32."""
    blocks = max(1, mib * MIB // (4 * 4 * (SIDE * SIDE + VECTORS * SIDE)))
    shapes: dict[str, tuple[int, ...]] = {f"blocks.{i}.weight": (SIDE, SIDE) for i in range(blocks)}
    shapes |= {f"blocks.{i}.v{j}": (SIDE,) for i in range(blocks) for j in range(VECTORS)}
    return {
        f"{prefix}.{name}": torch.randn(shape, device=device)
        for prefix in ("model", "exp_avg", "exp_avg_sq", "ema")
        for name, shape in shapes.items()
    }


def now() -> float:
    """Seconds, once the device has done everything so far."""
    measuring.synchronize()
    return time.perf_counter()


def savers_in(folder: Path, world: World) -> dict[str, Saver]:
    """One that saves at once and one that saves behind the training, each in a folder of its own."""
    return {
        mode: Saver(
            folder / mode,
            CheckpointConfig(mode=mode, keep_last=1),
            world,
            timedelta(minutes=10),
        )
        for mode in ("sync", "async")
    }


def measure(
    folder: Path, tensors: dict[str, Tensor], repeats: int, world: World
) -> tuple[dict[str, Measured], dict[str, str | int | float | None]]:
    """Seconds that the training waits for a save of each kind, and what follows from them."""
    savers = savers_in(folder, world)
    began = now()
    savers["async"].prepare(tensors)
    prepared = now() - began
    stalls: dict[str, list[float]] = {"sync": [], "async": []}
    behind = []
    for step in range(1, repeats + 2):
        # The first one behind the training comes first of all, before anything is warm.
        for mode in ("async", "sync"):
            began = now()
            savers[mode].save(step, tensors, {"step": step})
            # On a GPU the copy goes on beside the next forward and backward pass; here nothing is beside it, so this is
            # the most that a step can wait.
            savers[mode].let_write()
            stalls[mode].append(now() - began)
            savers[mode].wait()
            if mode == "async":
                behind.append(now() - began)
    sync = Stats.of(stalls["sync"])
    later = [100 * stall / sync.median for stall in stalls["async"][1:]]
    rate = [bytes_of(tensors) / 1e6 / seconds for seconds in stalls["sync"]]
    measured = {
        "save at once": Measured(sync, "s"),
        "save behind: stall of later saves": Measured(Stats.of(stalls["async"][1:]), "s"),
        "save behind: stall of later saves, share of a save at once": Measured(
            Stats.of(later), "%", "{:.2f}"
        ),
        "save behind: until committed": Measured(Stats.of(behind), "s"),
        "speed of a save at once, digests and fsync included": Measured(
            Stats.of(rate), "MB/s", "{:.0f}"
        ),
    }
    return measured, {
        "first save behind: stall, s": stalls["async"][0],
        "first save behind: stall, % of a save at once": 100 * stalls["async"][0] / sync.median,
        "memory touched before the first step, s": prepared,
    }
