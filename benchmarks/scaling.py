"""Weak scaling as the planner predicts it, with the formulas of what is sent, beside bytes counted on a few ranks.

    python -m benchmarks.scaling --out docs/scaling.md [--gpus 8,64,1024,10240]

Every GPU count gets as many micro-batches as GPUs, one clip each, and the fastest layout that fits. The counted bytes
are those of docs/parity.md, which `sora doctor parity` wrote; the planner's formulas must give the same.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.parallel.degrees import Degrees
from sora_train.tools.plan.assumptions import Assumptions
from sora_train.tools.plan.command import parse_command
from sora_train.tools.plan.plan import plan_run, units_of_config
from sora_train.tools.plan.search import with_layout
from sora_train.tools.plan.time.cluster import parse_cluster
from sora_train.tools.plan.time.step import Bench, step_volume
from sora_train.tools.plan.time.work import Imbalance, stage_work

GPUS = "8,64,1024,10240"
CARD = "H100"
WORDS = (
    "model=wan_14b", "text=umt5_xxl", "vae=wan_2_1_weights", "data.source=x", "data.cache=latents",
    "data.cache_text_gb=10000", "data.micro_batch=1", "model.mask_channel=true", "plan.counted=0",
    'buckets.classes=[{name: 720p, pixels: 921600, frames: [81], aspect_ratios: ["16:9"]}]', "buckets.fps=16",
)  # fmt: skip
COUNTED = {
    "ddp x2": Degrees(2, 1, 1, 1),
    "fsdp x2": Degrees(1, 2, 1, 1),
    "hsdp 2x2": Degrees(2, 2, 1, 1),
}
"""Layouts of docs/parity.md whose bytes no clip's length decides."""
KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send")
REPO = Path(__file__).resolve().parent.parent
INTRO = """\
# Weak scaling

Predicted by `python -m benchmarks.scaling`, not measured: no cluster has run this. `wan_14b` on clips of 720p and 81
frames (75,600 tokens), as many micro-batches of one clip as GPUs, latents and captions cached, the fastest layout that
fits. Assumptions are those of [plan.md](plan.md): NVLink 450 GB/s and 50 GB/s of network a GPU, of which collectives
reach 0.8, 5 microseconds for each node that one goes through, attention by FlashAttention-4. Links that others slow
down and nodes that are slower than others are in none of the numbers; bytes and
seconds of sending are those of a rank in a step.

| H100 | layout; memory options | s a step | MFU | of the first | GB sent | weights, gradients | not hidden | Ulysses |
|--:|---|--:|--:|--:|---|--:|--:|--:|
"""
FORMULAS = """
## Formulas

Of one rank in a step, with A micro-batches a rank, n weights (the first dimension of each filled up to a multiple of
S), s bytes a value while computing (2), r while reducing (4), S ranks that share weights, L tokens of a micro-batch, D
the width, c ranks of context parallelism, k blocks:

| collective | bytes |
|---|---|
| all-gather of weights | 2 A n s, 0 where S = 1 |
| reduce-scatter of gradients | n r, times A with `parallel.accumulate=sharded`; 0 where S = 1 |
| all-reduce over replicas | n r / S, 0 where there are none |
| all-to-all (Ulysses) | 8 k L D s / c a micro-batch, and the velocity's tokens |
| send (ring of g) | 2 k L D (2 s (g - 1) + r g) / c a micro-batch |

A group that lies on several nodes, p of its S ranks on each, is bound by the network: of V bytes (1 - p / S) come into
a node over p adapters, so a rank waits V (1 - p / S) / (p x 40 GB/s). What compute does not cover is waited for.

## The formulas beside counted bytes

Counted by intercepting every collective of the third step of `parity_tiny` ([parity.md](parity.md)), the sum over all
ranks; the planner's formula is evaluated on the same layout. A test compares them, and `sora doctor parity` those of
context parallelism, whose bytes depend on the clips of the step.

| layout | micro-batches a rank | bytes a value | collective | counted | formula |
|---|--:|--:|---|--:|--:|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPO / "docs" / "scaling.md")
    parser.add_argument("--gpus", default=GPUS)
    options = parser.parse_args()
    planned = [planned_on(int(gpus)) for gpus in options.gpus.split(",")]
    options.out.write_text(page(planned))
    return 0


def planned_on(gpus: int) -> dict[str, Any]:
    """The plan on so many GPUs: cluster and its one stage."""
    frozen, cluster, assume = parse_command(
        [*WORDS, f"cluster={gpus}x{CARD}", f"train.micro_batches={gpus}"], None
    )
    plan = plan_run(frozen.config, frozen.stages, cluster, assume, lambda what, done, of: None)
    return {"gpus": gpus, **plan["stages"][0]}


def counted(text: str) -> list[tuple[str, int, int, str, int]]:
    """(layout, micro-batches a rank, bytes of a number, collective, bytes of all ranks) of docs/parity.md."""
    rows = []
    pattern = r"^\| ([^|]+) \| (\d+) x sgd \| (float64|bfloat16) \|(?:[^|]*\|){4} ([^|]+) \|$"
    for layout, slots, dtype, volume in re.findall(pattern, text, re.MULTILINE):
        if layout in COUNTED:
            for kind, size in re.findall(r"(\w+) ([\d,]+)", volume):
                rows.append(
                    (
                        layout,
                        int(slots),
                        {"float64": 8, "bfloat16": 2}[dtype],
                        kind,
                        int(size.replace(",", "")),
                    )
                )
    return rows


def by_formula(layout: str, slots: int, size: int) -> dict[str, float]:
    """Bytes of all ranks in a step of `parity_tiny`, by the planner's formulas."""
    degrees = COUNTED[layout]
    ranks = degrees.dp_replicate * degrees.dp_shard
    dtype = {8: "float64", 2: "bfloat16"}[size]
    cfg: Config = compose(
        [
            "experiment=parity_tiny",
            f"train.micro_batches={slots * ranks}",
            f"parallel.param_dtype={dtype}",
        ]
    ).config
    assume = Assumptions()
    work = stage_work(cfg, assume)
    cluster = parse_cluster(f"{ranks}xcpu", {})
    bench = Bench(work, cluster, assume, units_of_config(cfg), Imbalance(work))
    volume = step_volume(bench, with_layout(cfg, "fsdp", degrees, {}), degrees, slots)
    return {kind: ranks * value for kind, value in volume.items()}


def page(planned: list[dict[str, Any]]) -> str:
    """The page of the docs."""
    first = planned[0]["step"]["mfu"]
    lines = []
    for row in planned:
        sent, step = row["communication"], row["step"]
        sizes = sent["gb"]
        volume = ", ".join(f"{kind} {sizes[kind]:,.1f}" for kind in KINDS if sizes.get(kind))
        cells = (
            f"{row['gpus']:,}", f"{row['layout']}; {row['options']}", f"{step['seconds']:.2f}",
            f"{100 * step['mfu']:.1f} %", f"{100 * step['mfu'] / first:.1f} %", volume,
            f"{sent['seconds']:.2f}", f"{sent['not_hidden']:.2f}",
            f"{step['parts']['token exchange (Ulysses, ring)']:.2f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |\n")
    rows = []
    for layout, slots, size, kind, found in counted((REPO / "docs" / "parity.md").read_text()):
        expected = by_formula(layout, slots, size).get(kind, 0)
        rows.append(f"| {layout} | {slots} | {size} | {kind} | {found:,} | {expected:,.0f} |\n")
    return INTRO + "".join(lines) + FORMULAS + "".join(rows)


if __name__ == "__main__":
    raise SystemExit(main())
