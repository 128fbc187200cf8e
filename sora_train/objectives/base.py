"""What an objective is: from this rank's clips to named terms, each a sum with its weight.

A term's weight is announced before the first forward of a step, so that the true total over all
ranks and micro-batches is known before the first backward and the loss is scaled in one place.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from sora_train.data.sample import ClipBatch
from sora_train.errors import UserError


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

    def require_same(self, state: dict[str, Any]) -> None:
        """Raises UserError where a checkpoint's `state` tells other facts than this run's."""
        before = state.get("objective", {})
        for name, value in self.facts().items():
            if before.get(name, value) != value:
                raise UserError(
                    f"the checkpoint of step {state['step']} was trained with {name}={before[name]}, and here it is "
                    f"{value}; give the same file to go on, or another run.dir to start anew"
                )
