"""The clips of one step: what was trained where, with which draws, at what loss; one row a clip.

The rows follow from micro-batches and their terms. So a live run that has these at hand and `sora replay`, which
rebuilds any step of any run, describe a step in the same way.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sora_train.data.sample import ClipBatch
from sora_train.objectives import LossTerm, Objective, SampleInfo
from sora_train.training.pipeline.data import TrainingData


@dataclass(frozen=True)
class StepSample:
    """A clip of a step. What an objective does not define, or a replay without a model cannot know, is None."""

    rank: int
    slot: int
    """Which micro-batch of the rank it was in."""
    row: int
    epoch: int
    """Row and epoch are what the draws are keyed by."""
    key: str
    path: str
    source: str
    bucket: str
    fps: float | None = None
    caption: str | None = None
    prompt: str | None = None
    """What the model was told; '' where the caption was dropped."""
    kind: str | None = None
    """Kind of conditioning."""
    condition_frames: Sequence[int] | None = None
    """Of each latent frame 1 where it was a condition."""
    t: float | None = None
    """Noise level: 0 is data, 1 is noise."""
    t_condition: float | None = None
    """Noise level of the condition frames."""
    loss: float | None = None
    """The clip's own mean error."""
    loss_sum: float | None = None
    """Its part of the micro-batch's loss sums."""
    share: float | None = None
    """Its part of the step's loss: shares add up to the loss."""
    failure: str | None = None
    """Why the clip was not trained."""

    def to_dict(self) -> dict[str, Any]:
        return finite(asdict(self))


def samples_of(
    objective: Objective,
    data: TrainingData,
    batches: Sequence[ClipBatch],
    places: Sequence[tuple[int, int]],
    terms: Sequence[Mapping[str, LossTerm]] = (),
    totals: Mapping[str, float] | None = None,
) -> list[list[StepSample]]:
    """The clips of each micro-batch in their order, those that failed after the good ones.

    Args:
        places: (rank, slot) of each micro-batch.
        terms: of each micro-batch, as the objective gave them; empty: losses are not known.
        totals: each term's total weight over the step.
    """
    rows = []
    for number, (batch, (rank, slot)) in enumerate(zip(batches, places, strict=True)):
        bucket = batch.micro_batch.bucket.name
        where: dict[str, Any] = {"rank": rank, "slot": slot, "bucket": bucket}
        infos = objective.describe(batch) or [SampleInfo()] * len(batch.clips)
        losses = _losses(batch, infos, terms[number], totals or {}) if terms else []
        of_batch = [
            StepSample(
                **where,
                **_origin(data, clip.row),
                epoch=clip.epoch,
                fps=clip.fps,
                caption=clip.caption,
                prompt=info.prompt,
                kind=info.kind,
                condition_frames=info.condition_frames,
                t=info.t,
                t_condition=info.t_condition,
                **(losses[i] if losses else {}),
            )
            for i, (clip, info) in enumerate(zip(batch.clips, infos, strict=True))
        ]
        epochs = dict(zip(batch.micro_batch.rows, batch.micro_batch.epochs, strict=True))
        of_batch += [
            StepSample(
                **where,
                **_origin(data, failed.row),
                epoch=epochs.get(failed.row, 0),
                failure=f"{failed.reason}: {failed.detail}",
            )
            for failed in batch.failures
        ]
        rows.append(of_batch)
    return rows


def _origin(data: TrainingData, row: int) -> dict[str, Any]:
    manifest, sources = data.manifest, data.sources
    return {
        "row": row,
        "key": str(manifest.key[row]),
        "path": manifest.path(row),
        "source": sources.names[int(sources.source_of_row[row])],
    }


def _losses(
    batch: ClipBatch,
    infos: Sequence[SampleInfo],
    terms: Mapping[str, LossTerm],
    totals: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Loss, loss sum and share of each clip; [] where a term is not split into its clips."""
    parts = {name: term.per_sample for name, term in terms.items()}
    if not batch.clips or any(part is None for part in parts.values()):
        return []
    values = {name: part.double().tolist() for name, part in parts.items() if part is not None}
    losses = []
    for i, info in enumerate(infos):
        loss_sum = sum(part[i] for part in values.values())
        shares = [part[i] / max(totals.get(name, 1.0), 1.0) for name, part in values.items()]
        losses.append(
            {
                "loss": loss_sum / max(1.0, info.weight),
                "loss_sum": loss_sum,
                "share": sum(shares),
            }
        )
    return losses


def finite(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as JSON has them: it lacks numbers that are not finite, so `nan`, `inf` and `-inf` become words."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in facts.items()
    }
