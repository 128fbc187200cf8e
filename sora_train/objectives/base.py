"""What an objective is: from this rank's clips to named terms, each a sum with its weight.

A term's weight is announced before the first forward of a step, so that the true total over all
ranks and micro-batches is known before the first backward and the loss is scaled in one place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from sora_train.data.sample import Clip, ClipBatch
from sora_train.errors import UserError
from sora_train.runtime.control_plane import ControlPlane


@dataclass(frozen=True)
class SampleInfo:
    """Of each clip of a term, in the order of `per_sample`: its noise level, kind of conditioning, and weight."""

    times: Tensor
    kinds: list[str]
    weights: Tensor


@dataclass(frozen=True)
class LossTerm:
    """A differentiable sum over samples and the number of samples (or what else) it is a sum of."""

    sum: Tensor
    weight: float
    per_sample: Tensor | None = None
    """Each clip's part of the sum, (B,), without gradient, where the objective tells it: what a replay shows."""
    info: SampleInfo | None = None
    """What the losses of the clips are told apart by, where the objective tells it."""


@dataclass(frozen=True)
class SampleDraws:
    """What chance decides about the clips of a batch, keyed by (epoch, row): the kind of conditioning and the
    latent frames it gives, (B, T), the noise level of the clip and of its given frames, (B,), and the prompt that
    the model is told ('' where the caption was dropped)."""

    keys: list[tuple[int, int]]
    kinds: list[str]
    mask_BT: Tensor
    t_B: Tensor
    t_cond_B: Tensor
    prompts: list[str]


class Objective(Protocol):
    """Subclass or write your own: see docs/extend.md."""

    def weights(self, batch: ClipBatch) -> dict[str, float]:
        """Weight of every term for this micro-batch, known without any forward."""

    def terms(self, model: nn.Module, batch: ClipBatch) -> dict[str, LossTerm]:
        """The same names with their differentiable sums; the loss is the sum of sum / total weight."""

    # What an objective with weights of its own to train does besides; most have none.

    def step(self) -> dict[str, float]:
        """Called once for every step that is taken, just before the weights change: update what is the
        objective's own. A collective; returns metrics of the step, the same on every rank."""
        return {}

    def skip(self) -> None:
        """Called in its place for a step that is not taken: forget what was gathered for it."""
        return

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of its own that a checkpoint holds, loadable in place, the same on every rank."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint tells of the objective besides: the frozen weights that the loss was made with."""
        return {}

    def require_same(self, before: dict[str, Any], step: int) -> None:
        """Raises UserError where the facts of the checkpoint of a step are other ones than this run's."""
        for name, value in self.facts().items():
            if before.get(name, value) != value:
                raise UserError(
                    f"the checkpoint of step {step} was trained with {name}={before[name]}, and here it is "
                    f"{value}; give the same file to go on, or another run.dir to start anew"
                )

    # What an objective can do besides; one that cannot leaves it as it is.

    def validate(
        self,
        model: nn.Module,
        clips: list[Clip],
        control: ControlPlane,
        check_preemption: Callable[[], None],
        live: bool = False,
    ) -> dict[str, float]:
        """Metrics of the weights as they are on held-out clips (docs/metrics.md, `val/`); {}: none. A collective.

        Args:
            check_preemption: to be called before each batch, as often on every rank.
            live: only `val/loss` is asked for, that of the weights which are not averaged.
        """
        return {}

    def probe_loss(self, model: nn.Module, clips: list[Clip]) -> float | None:
        """One number that weights and arithmetic decide, at fixed noise; None: there is none to compare by."""
        return None

    def describe(self, batch: ClipBatch) -> SampleDraws | None:
        """What chance decides about the clips of a batch, without encoding any; None where nothing is drawn."""
        return None

    exports: bool = False
    """Whether `export` writes something."""

    def export(self, weights: dict[str, Tensor], folder: Path, clips: Iterator[list[Clip]]) -> None:
        """Write the averaged weights into the run folder in a form that others load; the first rank alone.

        Args:
            weights: whole parameters and buffers by name, on the CPU.
            clips: training clips, for what has to be measured.
        """
        return
