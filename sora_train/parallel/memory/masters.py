"""Float32 masters of a model that computes in less, on one rank, where nothing is gathered.

The model holds copies of the masters in its own dtype, made anew after each update. Gradients come in
that dtype and are added up in the masters', one weight at a time during backward, so that neither the
copies nor the gradients ever exist twice.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Masters:
    """Master weights by name, with their gradients; the model's parameters become copies of them."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.copies = dict(model.named_parameters())
        self.named: dict[str, nn.Parameter] = {}
        for name, copy in self.copies.items():
            # A parameter of its own on the memory that the model's has had until now.
            self.named[name] = master = nn.Parameter(copy.detach(), copy.requires_grad)
            copy.data = copy.detach().to(dtype)
            if copy.requires_grad:
                copy.register_post_accumulate_grad_hook(lambda p, m=master: _hand_over(p, m))

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        return self.named.items()

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Compute with the masters as they are now."""
        torch._foreach_copy_(list(self.copies.values()), list(self.named.values()))


def _hand_over(copy: nn.Parameter, master: nn.Parameter) -> None:
    """Add a micro-batch's gradient to those before it, in the master's precision."""
    grad, copy.grad = copy.grad, None
    assert grad is not None
    if master.grad is None:
        master.grad = grad.to(master.dtype)
    else:
        master.grad.add_(grad)
