"""What an objective is: from this rank's clips to named terms, each a sum with its weight.

A term's weight is announced before the first forward of a step, so that the true total over all
ranks and micro-batches is known before the first backward and the loss is scaled in one place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sora_train.data.sample import Clip, ClipBatch, MicroBatch
from sora_train.errors import UserError
from sora_train.runtime.control_plane import ControlPlane


@dataclass(frozen=True)
class SampleInfo:
    """What is decided about one clip of a batch before the model sees it; None where it does not apply."""

    prompt: str | None = None
    """The caption that the model gets; '' where the caption was dropped."""
    kind: str | None = None
    """Kind of conditioning."""
    condition_frames: tuple[int, ...] | None = None
    """Of each latent frame 1 where it is a condition, 0 where it is generated."""
    t: float | None = None
    """Noise level: 0 is data, 1 is noise."""
    t_condition: float | None = None
    """Noise level of the condition frames."""
    weight: float = 1.0
    """How many units the clip's loss is a sum of: 1, or the number of its tokens that count."""


@dataclass(frozen=True)
class LossTerm:
    """A differentiable sum over samples, and the number of samples (or tokens) it is a sum of."""

    sum: Tensor
    weight: float
    per_sample: Tensor | None = None
    """Each clip's part of the sum, (B,), without gradient; None where the objective does not split it."""
    info: Sequence[SampleInfo] = ()
    """The clips of `per_sample`, where the loss is reported by noise level and kind."""


class Objective(ABC):
    """Subclass it, or one of the two that are shipped: see docs/extend.md."""

    @abstractmethod
    def weights(self, batch: ClipBatch) -> dict[str, float]:
        """Weight of every term for this micro-batch, known without any forward."""

    @abstractmethod
    def terms(self, model: nn.Module, batch: ClipBatch) -> dict[str, LossTerm]:
        """The same names with their differentiable sums; the loss is the sum of sum / total weight."""

    def expect(self, micro_batches: Sequence[MicroBatch]) -> None:
        """What the next step will hold, as far as the tape knows; a chance to prepare while this one is computed."""
        return

    def take_encode_seconds(self) -> float:
        """Seconds that the device has spent in frozen networks since it was asked last; it is waited for before."""
        return 0.0

    # --- what a run reports of it; without these there is nothing to report ---

    def describe(self, batch: ClipBatch) -> list[SampleInfo]:
        """One entry for each clip of `batch.clips`, for replays, records of skipped steps and debug mode."""
        return []

    def validate(
        self,
        model: nn.Module,
        clips: list[Clip],
        control: ControlPlane,
        check_preemption: Callable[[], None] = lambda: None,
        *,
        live: bool = False,
    ) -> dict[str, float]:
        """Metrics of the weights as they are on held-out clips, `val/loss` among them; {} where there are none.

        A collective: every rank passes the same clips and returns the same numbers.

        Args:
            check_preemption: called before each batch, equally often on all ranks.
            live: the weights are those being trained, not their average, and only `val/loss` is read of the result.
        """
        return {}

    def probe_loss(self, model: nn.Module, clips: list[Clip]) -> float | None:
        """Loss of a few held-out clips of one shape without any randomness; None where it cannot be measured.

        A checkpoint records it, and whoever loads the checkpoint measures it again.
        """
        return None

    exports: bool = False
    """Whether `export` writes something."""

    def export(self, weights: dict[str, Tensor], folder: Path, clips: Iterator[list[Clip]]) -> None:
        """Write the averaged weights into the run folder in a form that other runs load; the first rank alone.

        Args:
            weights: whole parameters and buffers by name, on the CPU.
            clips: training clips, read as they are asked for.
        """
        return

    # --- for an objective that trains weights of its own ---

    def step(self) -> dict[str, float]:
        """Update the objective's own weights; called once for every step that is taken, after the model's change.

        A collective; returns metrics of the step, the same on every rank.
        """
        return {}

    def skip(self) -> None:
        """Forget what was gathered for a step; called in place of `step` where the step is not taken."""
        return

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of its own that a checkpoint holds, loadable in place, the same on every rank."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What else a checkpoint records of the objective: digests of the frozen weights that the loss uses."""
        return {}

    def require_same(self, before: dict[str, Any], step: int) -> None:
        """Raises UserError where the facts of the checkpoint of a step are not those of this run."""
        for name, value in self.facts().items():
            if before.get(name, value) != value:
                raise UserError(
                    f"the checkpoint of step {step} was trained with {name}={before[name]}, and here it is "
                    f"{value}; give the same file to go on, or another run.dir to start anew"
                )
