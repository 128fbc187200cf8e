"""What an optimizer keeps of a parameter, by name: the same names under every engine and layout.

Torch makes it in the first step; here it is made before, so that a checkpoint can be loaded into it. Torch's AdamW
keeps `step`, `exp_avg` and `exp_avg_sq`, plain SGD nothing. An optimizer of ours tells by its `initial_state`.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Keeping(Protocol):
    """An optimizer that tells what it keeps."""

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is kept of a parameter before its first step. A tensor has no dimension, or the parameter's rows as its
        first, so that it is sharded as the parameter is."""


def moments_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps of this parameter, in place loadable."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        if isinstance(optimizer, Keeping):
            state.update(optimizer.initial_state(parameter))
        elif isinstance(optimizer, torch.optim.AdamW):
            state.update(adam_moments(parameter))
    return state


def adam_moments(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state before its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
