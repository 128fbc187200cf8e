"""Exponential moving average of the weights: float32 shadows placed exactly as the parameters are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sora_train.parallel.engine import local


class Ema:
    """shadow <- decay * shadow + (1 - decay) * weight, with the start of the average ramped.

    The ramp min(decay, (1 + step) / (10 + step)) keeps the random initial weights from lingering.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.shadow: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Fold in the weights after optimizer step `step` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = dict(model.named_parameters())
        shadows = [local(shadow) for shadow in self.shadow.values()]
        weights = [local(parameters[name].detach()) for name in self.shadow]
        torch._foreach_lerp_(shadows, weights, 1.0 - decay)

    def state(self) -> dict[str, Tensor]:
        return self.shadow

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Inside the block the model computes with the averages; afterwards with its own weights again."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            ours, theirs = local(self.shadow[name]), local(parameter.detach())
            kept = theirs.clone()
            theirs.copy_(ours)
            ours.copy_(kept)
