"""The record of a skipped step: which clips it held on which rank, their noise levels and losses, and the limits.

RUN/spikes/step-N.json, N as in metrics.jsonl; `step-N.rK.json` after K roll-backs, when other data
stands under the same number. Written by the first rank from what all ranks send.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from sora_train.base.files import write_atomically
from sora_train.checkpoint.meta import TrainState
from sora_train.data.sample import ClipBatch
from sora_train.objectives import LossTerm
from sora_train.training.components import Components
from sora_train.training.outputs.step_picture import draw_step, samples_of
from sora_train.training.resilience.spike_detector import SpikeDetector, StepVerdict
from sora_train.training.run import RunContext

Terms = dict[str, LossTerm]
"""The terms of one micro-batch."""


def record_spike(
    run: RunContext,
    parts: Components,
    state: TrainState,
    spikes: SpikeDetector,
    verdict: StepVerdict,
    batches: Sequence[ClipBatch],
    terms: Sequence[Terms],
    totals: dict[str, float],
) -> None:
    """Write down what is known of a step that is skipped, and draw its clips; a collective."""
    step, rollbacks = state.step + 1, spikes.tally.rollbacks
    if run.cfg.spike_detection.draw:
        places = [(run.world.rank, slot) for slot in range(len(batches))]
        samples = samples_of(parts.objective, parts.data.manifest, batches, places, terms, totals)
        draw_step(run, parts, samples, batches, step, state.data_step, why=verdict.sentence())
    mine = [described(parts, batch, each) for batch, each in zip(batches, terms, strict=True)]
    # Ranks that share a micro-batch hold the same clips: the first of them speaks for all.
    gathered = run.control.gather_objects(mine)[:: run.world.cp]
    if not run.is_main:
        return
    ranks = range(0, run.world.size, run.world.cp)
    limits = ("loss", "grad_norm", "loss_limit", "grad_norm_limit")
    report = {
        "step": step,
        "data_step": state.data_step,
        "rollbacks": rollbacks,
        "seed": run.cfg.seed,
        "reason": verdict.reason,
        **{name: finite(getattr(verdict, name)) for name in limits},
        "ranks": [
            {"rank": rank, "micro_batches": held}
            for rank, held in zip(ranks, gathered, strict=True)
        ],
    }
    folder = run.folder.path / "spikes"
    folder.mkdir(exist_ok=True)
    suffix = f".r{rollbacks}" if rollbacks else ""
    file = folder / f"step-{step:06d}{suffix}.json"
    write_atomically(file, json.dumps(report, indent=1))
    print(f"step {step} skipped: {verdict.sentence()}; its clips are in {file}", flush=True)


def described(parts: Components, batch: ClipBatch, terms: Terms) -> dict[str, Any]:
    """One micro-batch of this rank: its losses, and its clips by all that keys their draws."""
    entry, data = batch.micro_batch, parts.data
    failed = {failure.row: failure.reason for failure in batch.failures}
    infos = zip(batch.clips, parts.objective.describe(batch), strict=False)
    times = {clip.row: info.t for clip, info in infos}
    losses = clip_losses(batch, terms)
    clips = [
        {
            "row": row,
            "epoch": epoch,
            "key": str(data.manifest.key[row]),
            "shard": str(data.manifest.shard[row]),
            "source": data.sources.names[int(data.sources.source_of_row[row])],
            "t": times.get(row),
            "loss_sum": losses.get(row),
            "failed": failed.get(row),
        }
        for row, epoch in zip(entry.rows, entry.epochs, strict=True)
    ]
    return {
        "index": entry.index,
        "bucket": entry.bucket.name,
        "loss_sums": {name: finite(float(term.sum)) for name, term in terms.items()},
        "weight": batch.weight,
        "clips": clips,
    }


def clip_losses(batch: ClipBatch, terms: Terms) -> dict[int, float | str]:
    """Each good clip's part of the loss sums, by row; {} where an objective does not tell."""
    parts = [term.per_sample for term in terms.values() if term.per_sample is not None]
    if len(parts) < len(terms) or not batch.clips:
        return {}
    sums = torch.stack(parts).double().sum(dim=0).tolist()
    return {clip.row: finite(value) for clip, value in zip(batch.clips, sums, strict=True)}


def finite(value: float) -> float | str:
    """JSON has no numbers that are not finite: `nan`, `inf` and `-inf` are written as words."""
    return value if math.isfinite(value) else str(value)
