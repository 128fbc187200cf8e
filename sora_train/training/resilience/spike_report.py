"""The record of a skipped step: which clips it held on which rank, their noise levels and losses, and the limits.

RUN/spikes/step-N.json, N as in metrics.jsonl; `step-N.rK.json` after K roll-backs, when other data
stands under the same number. Written by rank 0 from what all ranks send.
"""

import json
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from sora_train.base.files import write_atomically
from sora_train.data.sample import ClipBatch
from sora_train.objectives import LossTerm, TextToVideoObjective
from sora_train.runtime.control_plane import ControlPlane
from sora_train.training.outputs.step_picture import draw_step
from sora_train.training.spike_detector import StepVerdict

if TYPE_CHECKING:
    from sora_train.training.trainer import Trainer

Parts = dict[str, LossTerm]
"""The terms of one micro-batch."""


def record_spike(
    trainer: "Trainer",
    verdict: StepVerdict,
    batches: list[ClipBatch],
    parts: list[Parts],
    totals: dict[str, float],
) -> None:
    """Write down what is known of a step that is skipped, and draw its clips; every rank calls this."""
    mine = [micro_batch(trainer, batch, terms) for batch, terms in zip(batches, parts, strict=True)]
    if trainer.cfg.spike_detection.draw:
        draw_step(trainer, trainer.step + 1, batches, parts, totals, why=verdict.sentence())
    # Ranks that share a micro-batch hold the same clips: the first of them speaks for all.
    found = gather(trainer.control, mine)[:: trainer.world.cp]
    if not trainer.world.is_main:
        return
    step, rollbacks = trainer.step + 1, trainer.judge.tally.rollbacks
    ranks = range(0, trainer.world.size, trainer.world.cp)
    report = {
        "step": step,
        "data_step": trainer.data_step,
        "rollbacks": rollbacks,
        "seed": trainer.cfg.seed,
        "reason": verdict.reason,
        **{
            name: finite(getattr(verdict, name))
            for name in ("loss", "grad_norm", "loss_limit", "grad_norm_limit")
        },
        "ranks": [
            {"rank": rank, "micro_batches": held} for rank, held in zip(ranks, found, strict=True)
        ],
    }
    folder = trainer.folder.path / "spikes"
    folder.mkdir(exist_ok=True)
    suffix = f".r{rollbacks}" if rollbacks else ""
    file = folder / f"step-{step:06d}{suffix}.json"
    write_atomically(file, json.dumps(report, indent=1))
    print(f"step {step} skipped: {verdict.sentence()}; its clips are in {file}", flush=True)


def micro_batch(trainer: "Trainer", batch: ClipBatch, terms: Parts) -> dict[str, Any]:
    """One micro-batch of this rank: its losses, and its clips by all that keys their draws."""
    entry, data = batch.micro_batch, trainer.data
    failed = {failure.row: failure.reason for failure in batch.failures}
    times, losses = noise_levels(trainer, batch), clip_losses(batch, terms)
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


def noise_levels(trainer: "Trainer", batch: ClipBatch) -> dict[int, float]:
    """The noise level that each good clip is trained at, by row; {} for an objective without."""
    if not isinstance(trainer.objective, TextToVideoObjective) or not batch.clips:
        return {}
    times = trainer.objective.draws(batch).t_B.tolist()
    return {clip.row: t for clip, t in zip(batch.clips, times, strict=True)}


def clip_losses(batch: ClipBatch, terms: Parts) -> dict[int, float | str]:
    """Each good clip's part of the loss sums, by row; {} where an objective does not tell."""
    parts = [term.per_sample for term in terms.values() if term.per_sample is not None]
    if len(parts) < len(terms) or not batch.clips:
        return {}
    sums = torch.stack(parts).double().sum(dim=0).tolist()
    return {clip.row: finite(value) for clip, value in zip(batch.clips, sums, strict=True)}


def finite(value: float) -> float | str:
    """JSON has no numbers that are not finite: `nan`, `inf` and `-inf` are written as words."""
    return value if math.isfinite(value) else str(value)


def gather(control: ControlPlane, value: object) -> list[Any]:
    """Every rank's value, in the order of ranks, on all ranks."""
    if control.group is None:
        return [value]
    found: list[Any] = [None] * control.world.size
    dist.all_gather_object(found, value, group=control.group)
    return found
