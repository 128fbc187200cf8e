"""Beside every number of the suite what was predicted of it: `OUT/predicted.md`, written anew after each part.

    python -m benchmarks.gpu.predicted OUT

Predictions are those of the planner (docs/plan.md) for one H200 and of the models of memory; rates of single kernels
are published ones. A number that is not there yet has a dash.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sora_train.base.files import write_atomically
from sora_train.config import Config, ParallelConfig
from sora_train.config.compose import compose
from sora_train.models.memory import ClipSize, kept_bytes, transformer_parameters
from sora_train.models.transformer.dit import VideoDiT
from sora_train.parallel.checks.volume import units_of
from sora_train.parallel.degrees import Degrees
from sora_train.tools.plan.assumptions import Assumptions
from sora_train.tools.plan.search import with_layout
from sora_train.tools.plan.time.cluster import parse_cluster
from sora_train.tools.plan.time.rates import KERNELS
from sora_train.tools.plan.time.step import Bench, StepPlan, step_plan
from sora_train.tools.plan.time.work import Imbalance, stage_work

CARD, PEAK = "H200", 989.0
WORDS = ("model=wan_1_3b", "text=umt5_xxl", "vae=wan_2_1", "data.source=x", "data.cache=latents",
         "data.micro_batch=1", "train.steps=1", "buckets.fps=16")  # fmt: skip
MIB = 2**20
Row = tuple[str, str, str, float, str]
"""(file, number, unit, predicted, where the prediction is from)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    flash4 = "forward, flash4" in read(options.out, "ceilings").get("measured", {})
    write_atomically(options.out / "predicted.md", table(options.out, list(rows(flash4))))
    return 0


def read(out: Path, name: str) -> dict[str, Any]:
    """The result NAME, in a folder of its part or in OUT itself; empty where it is not there."""
    for path in (out / f"{name}.json", *sorted(out.glob(f"{name}/*.json"))):
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
    return {}


def table(out: Path, expected: list[Row]) -> str:
    """Markdown."""
    lines = [
        "# Predicted and measured", "",
        "Predicted for one H200; see benchmarks/gpu/predicted.py for what each rests on.", "",
        "| part | number | predicted | measured | measured / predicted | from |",
        "|---|---|--:|--:|--:|---|",
    ]  # fmt: skip
    for name, number, unit, predicted, source in expected:
        result = read(out, name)
        value = result.get("measured", {}).get(number, {}).get("median")
        value = result.get("facts", {}).get(number) if value is None else value
        known = isinstance(value, int | float)
        shown = f"{value:,.4g} {unit}" if known else str(value or "-")
        ratio = f"{value / predicted:.2f}" if known else "-"
        lines.append(
            f"| {name} | {number} | {predicted:,.4g} {unit} | {shown} | {ratio} | {source} |"
        )
    return "\n".join(lines) + "\n"


def rows(flash4: bool) -> Iterable[Row]:
    """All predictions; `flash4` where FlashAttention-4 is on the machine."""
    yield "ceilings", "gemm", "TFLOP/s", 790.0, "power limit of the card"
    yield "ceilings", "copy", "GB/s", 4300.0, "0.9 of 4,800"
    for kernel in ("cudnn", "flash4"):
        for way, share in zip(("forward", "backward"), KERNELS[kernel][:2], strict=True):
            yield "ceilings", f"{way}, {kernel}", "TFLOP/s", share * PEAK, "published"
    one = planned(flash4, [81])
    parts = one.parts
    layers = 30
    names = ("matrix products", "attention, forward", "attention, backward", "attention to captions",
             "norms and gates")  # fmt: skip
    yield "block", "step", "s", sum(parts[name] for name in names) / layers, "planner"
    yield "block", "attention", "s", sum(parts[n] for n in names[1:4]) / layers, "planner"
    yield "block", "matrix products", "s", parts["matrix products"] / layers, "planner"
    yield "block", "norms and gates", "s", parts["norms and gates"] / layers, "planner"
    yield "block", "first step with compilation, s", "s", 45.0, "lowered on a CPU"
    yield "train_480p", "step time", "s", one.seconds, "planner"
    yield "train_480p", "MFU", "%", 100 * one.mfu, "planner"
    mixed = planned(flash4, [81, 33, 1])
    yield "train_three", "step time", "s", mixed.seconds, "planner"
    yield "train_three", "MFU", "%", 100 * mixed.mfu, "planner"
    yield "train_three", "data wait", "%", 1.0, "plan.data_wait"
    yield (
        "checkpoint",
        "save behind: stall of later saves",
        "s",
        0.05 + 8 * 2**30 / 55e9,
        "8 GiB over PCIe at 55 GB/s",
    )
    yield from memory_rows()
    half = sum(parts[n] for n in ("attention, forward",)) + parts["matrix products"] / 3
    yield "sampling", "sampling", "s", 4 * half, "planner, forward passes"
    yield "sampling", "encode", "frames/s", 81 / 1.8, "estimate"
    yield "sampling", "decode", "frames/s", 81 / 3.0, "estimate"


def memory_rows() -> Iterable[Row]:
    """Peak of a clip of 32,760 tokens: weights and gradients in bfloat16, what blocks keep, one block at work."""
    cfg: Config = compose(list(WORDS)).config
    weights, clip = 4 * transformer_parameters(cfg.model)[0], ClipSize(32_760, 4, 512)
    whole = kept_bytes(cfg.model, ParallelConfig(), clip, 2, compiled=True)
    for name, option in {
        "memory budget 0.5": {"activation_memory_budget": 0.5},
        "selective": {"activation_checkpointing": "selective"},
        "full": {"activation_checkpointing": "full"},
    }.items():
        parallel = ParallelConfig.model_validate(option)
        kept = kept_bytes(cfg.model, parallel, clip, 2, compiled=True)
        at_work = whole / cfg.model.num_layers
        yield (
            "memory",
            f"peak MiB, {name}",
            "MiB",
            (weights + kept + at_work) / MIB,
            "models/memory.py",
        )


def planned(flash4: bool, frames: list[int]) -> StepPlan:
    """A step of one micro-batch on one card, clips of 480x832 with so many frames."""
    bucket = f'buckets.classes=[{{name: one, pixels: 399360, frames: {frames}, aspect_ratios: ["26:15"]}}]'
    cfg: Config = compose([*WORDS, bucket, f"train.micro_batches={STEP[len(frames)]}"]).config
    assume = Assumptions(flash4=flash4)
    work = stage_work(cfg, assume)
    with torch.device("meta"):
        units = units_of(VideoDiT(cfg.model))
    bench = Bench(work, parse_cluster(f"1x{CARD}", {}), assume, units, Imbalance(work))
    single = Degrees(1, 1, 1, 1)
    options = {"activation_memory_budget": 0.7}
    return step_plan(bench, with_layout(cfg, "fsdp", single, options), single)


STEP = {1: 1, 3: 3}
"""Numbers of buckets -> micro-batches of a step in the suite."""

if __name__ == "__main__":
    raise SystemExit(main())
