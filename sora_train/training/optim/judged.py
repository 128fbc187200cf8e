"""An optimizer that is told on the device how to clip, and whether to take the step at all.

Torch's fused optimizers have this protocol for a scaler of float16 gradients: where `_step_supports_amp_scaling` is
set, whoever calls `step` may set `grad_scale`, by which gradients are divided, and `found_inf`, which is not 0 where
weights and state must stay as they are. The host does not wait for either.
"""

import torch
from torch import Tensor


class Judged(torch.optim.Optimizer):
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def taken(self) -> Tensor | float:
        """1, or 0 for a step that is not taken: a rate multiplied by it leaves everything as it was."""
        return 1.0 if self.found_inf is None else 1.0 - self.found_inf

    def gradient(self, parameter: Tensor) -> Tensor:
        """The gradient as clipped; 0 in a step that is not taken, where it may be anything."""
        grad = parameter.grad
        assert grad is not None
        if self.grad_scale is not None:
            grad = grad / self.grad_scale
        return grad if self.found_inf is None else torch.where(self.found_inf > 0, 0.0, grad)
