"""Which checkpoints stay: the newest, every n-th step for ever, and the best by validation."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sora_train.checkpoint.layout import REPLACED, TEMPORARY, Checkpoint, list_checkpoints
from sora_train.errors import Fault

METRIC = "val/loss"
"""What `keep_best` goes by: lower is better."""


@dataclass(frozen=True)
class Retention:
    """See the config's `checkpoint.keep_*`."""

    last: int
    every: int = 0
    best: int = 0

    def kept(self, losses: Mapping[int, float | None]) -> set[int]:
        """Of these steps, each with its validation loss where it has one, those that stay; the newest always."""
        steps = sorted(losses)
        kept = set(steps[-max(1, self.last) :])
        kept |= {step for step in steps if self.every and step % self.every == 0}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        sound = [step for step, loss in known.items() if math.isfinite(loss)]
        # Of equal losses the newer checkpoint is kept.
        return kept | set(sorted(sound, key=lambda step: (known[step], -step))[: self.best])


def loss_of(checkpoint: Checkpoint) -> float | None:
    """The validation loss of a checkpoint's step, if that step was validated."""
    row = checkpoint.state().get("row") or {}
    return row.get(METRIC)


def prune(folder: Path, keep_last: int, keep_every: int = 0, keep_best: int = 0) -> None:
    """Remove complete checkpoints that need not stay, and leftovers of torn saves.

    Raises:
        Fault: the folder cannot be written.
    """
    checkpoints = list_checkpoints(folder)
    losses = {
        checkpoint.step: loss_of(checkpoint) if keep_best else None for checkpoint in checkpoints
    }
    kept = Retention(keep_last, keep_every, keep_best).kept(losses)
    try:
        whole = {checkpoint.path for checkpoint in checkpoints}
        for torn in [*folder.glob(f"step-*{TEMPORARY}"), *folder.glob(f"step-*{REPLACED}")]:
            if torn not in whole:
                shutil.rmtree(torn)
        for checkpoint in checkpoints:
            if checkpoint.step not in kept:
                # Under this name a folder that is half removed is no checkpoint.
                torn = checkpoint.path.with_name(checkpoint.path.name + TEMPORARY)
                shutil.rmtree(checkpoint.path.rename(torn))
    except OSError as error:
        raise Fault(
            f"cannot remove old checkpoints in {folder}: {error.strerror} ({error.filename}); "
            "give the run permission to, or raise checkpoint.keep_last"
        ) from error
