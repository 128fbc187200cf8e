"""The record of a skipped step: its clips on every rank with their draws and losses, and the limits.

RUN/spikes/step-N.json, N as in metrics.jsonl, and a picture of each rank's clips in RUN/spikes/step-N/. After K
roll-backs other data stands under the same number: the file is then `step-N.rK.json`, and the folder's name has the
step of the tape too.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_train.base.files import write_atomically
from sora_train.checkpoint.meta import TrainState
from sora_train.data.sample import ClipBatch
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import LossTerm
from sora_train.training.components import Components
from sora_train.training.outputs.step_picture import draw_sheet
from sora_train.training.outputs.step_samples import StepSample, finite, samples_of
from sora_train.training.resilience.spike_detector import SpikeDetector, StepVerdict
from sora_train.training.run import RunContext

MAX_ROWS = 12
"""Clips drawn for each rank, since the run waits for it."""

Terms = dict[str, LossTerm]
"""The terms of one micro-batch."""


@dataclass(frozen=True)
class ComputedStep:
    """This rank's part of a step whose losses and gradients are known and whose update is still to come."""

    batches: Sequence[ClipBatch]
    terms: Sequence[Terms]
    """Of each micro-batch."""
    totals: dict[str, float]
    """Each term's total weight over all ranks and micro-batches."""


def record_spike(
    run: RunContext,
    parts: Components,
    state: TrainState,
    spikes: SpikeDetector,
    verdict: StepVerdict,
    computed: ComputedStep,
) -> None:
    """Record a step that is skipped, and draw its clips; a collective."""
    world, step, batches = run.world, state.step + 1, computed.batches
    places = [(world.rank, slot) for slot in range(len(batches))]
    samples = samples_of(
        parts.objective, parts.data, batches, places, computed.terms, computed.totals
    )
    # Ranks that share a micro-batch hold the same clips: the first of them reports them.
    if run.cfg.spike_detection.draw and not world.cp_rank:
        tape_step = "" if state.data_step == state.step else f"-tape-{state.data_step + 1:06d}"
        sheet = (
            run.folder.path / "spikes" / f"step-{step:06d}{tape_step}" / f"rank-{world.rank}.png"
        )
        title = f"step {step}, rank {world.rank} of {world.size}: {verdict.sentence()}"
        draw(sheet, title, samples, batches, parts.vae)
    mine = [micro_batch(*each) for each in zip(batches, computed.terms, samples, strict=True)]
    gathered = run.control.gather_objects(mine)[:: world.cp]
    if not run.is_main:
        return
    ranks = range(0, world.size, world.cp)
    limits = ("loss", "grad_norm", "loss_limit", "grad_norm_limit")
    report = {
        "step": step,
        "data_step": state.data_step,
        "rollbacks": spikes.counters.rollbacks,
        "seed": run.cfg.seed,
        "reason": verdict.reason,
        **finite({name: getattr(verdict, name) for name in limits}),
        "ranks": [
            {"rank": rank, "micro_batches": held}
            for rank, held in zip(ranks, gathered, strict=True)
        ],
    }
    suffix = f".r{spikes.counters.rollbacks}" if spikes.counters.rollbacks else ""
    file = run.folder.path / "spikes" / f"step-{step:06d}{suffix}.json"
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, json.dumps(report, indent=1))
    print(f"step {step} skipped: {verdict.sentence()}; its clips are in {file}", flush=True)


def draw(
    path: Path,
    title: str,
    samples: Sequence[Sequence[StepSample]],
    batches: Sequence[ClipBatch],
    vae: VideoVAE,
) -> None:
    """Draw this rank's clips. No rank waits for another, and a picture that cannot be drawn does not end the run."""
    rows = [sample for of_batch in samples for sample in of_batch]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(path, title, rows, batches, vae, MAX_ROWS)
    except Exception as error:
        message = f"the clips of a skipped step could not be drawn to {path}: {error}"
        print(message, file=sys.stderr, flush=True)


def micro_batch(batch: ClipBatch, terms: Terms, samples: Sequence[StepSample]) -> dict[str, Any]:
    return {
        "index": batch.micro_batch.index,
        "bucket": batch.micro_batch.bucket.name,
        "loss_sums": finite({name: float(term.sum) for name, term in terms.items()}),
        "weight": batch.weight,
        "clips": [sample.to_dict() for sample in samples],
    }
