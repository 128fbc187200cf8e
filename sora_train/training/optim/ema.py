"""Moving averages of the weights: float32 shadows placed exactly as the parameters are.

One average is always kept, `ema`. `ema.more` adds others of their own decays and `ema.post_hoc` ones of
power-function profiles (sora_train/training/optim/ema_profiles.py); each has a tag, under which checkpoints hold it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sora_train.checkpoint.layout import prefix_of, tag_of
from sora_train.errors import Fault, Preempted
from sora_train.parallel.protocol import Weights
from sora_train.parallel.shards import local, placed_as
from sora_train.training.optim.ema_profiles import power_decay

Decay = Callable[[int], float]
"""From the 0-based step to what is kept of the average in its update: no other state, so a resumed run has it."""


def ramped(decay: float) -> Decay:
    """min(decay, (1 + step) / (10 + step)), which keeps the random initial weights from lingering."""
    return lambda step: min(decay, (1 + step) / (10 + step))


def power(sigma_rel: float) -> Decay:
    return lambda step: power_decay(sigma_rel, step)


class Ema:
    """shadow <- decay * shadow + (1 - decay) * weight for each average, after each step of the optimizer.

    Attributes:
        shadows: tag -> parameter name -> average; the tag of the first, always kept one is empty.
    """

    def __init__(
        self,
        model: Weights,
        decay: float,
        more: Sequence[float] = (),
        post_hoc: Sequence[float] = (),
        changed: Callable[[], None] = lambda: None,
        own: Callable[[str, Tensor], Tensor] | None = None,
    ):
        """`changed` is called, on all ranks, when the weights were exchanged in place.

        `own` gives the optimizer's own average of a parameter, from its name and this rank's part; the average that is
        always kept is that one then, without a decay."""
        self._changed, self._own = changed, own
        self.decays: dict[str, Decay] = {"": ramped(decay)}
        self.decays |= {tag_of(value): ramped(value) for value in more}
        self.decays |= {tag_of(value, "s"): power(value) for value in post_hoc}
        self.profiles = {tag_of(value, "s"): value for value in post_hoc}
        self.shadows: dict[str, dict[str, Tensor]] = {
            tag: {name: shadow_of(parameter) for name, parameter in model.named_parameters()}
            for tag in self.decays
        }
        # Plain parts of the same memory: DTensors of a thousand weights take longer to unwrap than to average.
        self._weights = [local(parameter.detach()) for _, parameter in model.named_parameters()]
        self._parts = {
            tag: [local(shadow) for shadow in shadows.values()]
            for tag, shadows in self.shadows.items()
        }
        self._in_use = False

    @property
    def shadow(self) -> dict[str, Tensor]:
        """The average that is always kept."""
        return self.shadows[""]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Fold in the weights after optimizer step `step` (0-based); not to be called of a step that was skipped."""
        self._require_own_weights("updated")
        parts = self._parts[""]
        weights = [weight.to(part.dtype) for weight, part in zip(self._weights, parts, strict=True)]
        for tag, decay in self.decays.items():
            if self._own is not None and not tag:
                for name, weight, part in zip(self.shadow, weights, parts, strict=True):
                    part.copy_(self._own(name, weight))
            else:
                torch._foreach_lerp_(self._parts[tag], weights, 1.0 - decay(step))

    @torch.no_grad()
    def begin_with(self, model: Weights, names: set[str]) -> None:
        """Set averages to the weights as they are: those of these names in a checkpoint (`ema.*`, `ema_<tag>.*`)."""
        for name, parameter in model.named_parameters():
            for tag, shadows in self.shadows.items():
                if f"{prefix_of(tag)}{name}" in names:
                    local(shadows[name]).copy_(local(parameter.detach()))

    def state(self) -> dict[str, Tensor]:
        """Parameter name -> the average that is always kept, in place loadable."""
        self._require_own_weights("saved")
        return self.shadow

    def further_state(self) -> dict[str, Tensor]:
        """The other averages under their whole names in a checkpoint, `ema_<tag>.<parameter name>`."""
        self._require_own_weights("saved")
        return {
            f"{prefix_of(tag)}{name}": shadow
            for tag, shadows in self.shadows.items()
            if tag
            for name, shadow in shadows.items()
        }

    @contextmanager
    def swapped_in(self, model: Weights, tag: str = "") -> Iterator[None]:
        """Inside the block the model computes with an average; afterwards with its own weights again.

        Weights and shadows of one precision change places, without memory for a second copy; otherwise
        the weights are set aside.
        """
        self._require_own_weights("swapped in")
        self._in_use = True
        undo: list[Callable[[], None]] = []
        try:
            for name, parameter in model.named_parameters():
                undo.append(_swap_in(local(parameter.detach()), local(self.shadows[tag][name])))
            self._changed()
            yield
        except BaseException as error:
            self._put_back(undo)
            # All ranks leave together and then save; one that fails on its own must not wait for the others.
            if isinstance(error, Preempted):
                self._changed()
            raise
        else:
            self._put_back(undo)
            self._changed()

    def _put_back(self, undo: list[Callable[[], None]]) -> None:
        for back in reversed(undo):
            back()
        self._in_use = False

    def _require_own_weights(self, what: str) -> None:
        if self._in_use:
            raise Fault(
                f"the averages of the weights cannot be {what} while the model computes with one of them; leave "
                "the block of swapped_in first"
            )


def shadow_of(parameter: Tensor) -> Tensor:
    """A copy in float32 or better, with the parameter's own mesh, placements, shape and strides.

    The shape is told, not inferred: of uneven shards every rank would infer another.
    """
    part = local(parameter.detach())
    kept = torch.promote_types(part.dtype, torch.float32)
    return placed_as(part.to(kept, copy=True), parameter)


@torch.no_grad()
def _swap_in(weight: Tensor, average: Tensor) -> Callable[[], None]:
    """Put the average's values into `weight`; returns what undoes it."""
    aside = weight.clone()
    weight.copy_(average)
    if weight.dtype != average.dtype:
        return lambda: _put(weight, aside)
    average.copy_(aside)
    return lambda: _exchange(weight, average)


@torch.no_grad()
def _put(weight: Tensor, values: Tensor) -> None:
    weight.copy_(values)


@torch.no_grad()
def _exchange(one: Tensor, other: Tensor) -> None:
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)
