"""Float32 masters of a model that computes in less, on one rank, where nothing is gathered.

The model holds copies of the masters in its own dtype, made anew after each update. Gradients come in
that dtype and are added up in the masters', one weight at a time during backward, so that neither the
copies nor the gradients ever exist twice.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn


class Masters:
    """Master weights by name; the model's parameters become copies of them."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtype: torch.dtype):
        self.copies = dict(parameters)
        self.named: dict[str, nn.Parameter] = {}
        self._sums: dict[str, Tensor] = {}
        for name, copy in self.copies.items():
            # A parameter of its own on the memory that the model's has had until now.
            self.named[name] = nn.Parameter(copy.detach(), copy.requires_grad)
            copy.data = copy.detach().to(dtype)
            if copy.requires_grad:
                copy.register_post_accumulate_grad_hook(partial(self._hand_over, name))

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        return self.named.items()

    def take_gradients(self) -> dict[str, Tensor]:
        """The sums since they were asked for last, in the masters' precision."""
        sums, self._sums = self._sums, {}
        return {name: found.to(self.named[name].dtype) for name, found in sums.items()}

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Compute with the masters as they are now."""
        torch._foreach_copy_(list(self.copies.values()), list(self.named.values()))

    def _hand_over(self, name: str, copy: Tensor) -> None:
        """Add a micro-batch's gradient to those before it, in the wider of both precisions."""
        grad, copy.grad = copy.grad, None
        assert grad is not None
        if name in self._sums:
            self._sums[name].add_(grad)
        else:
            wide = torch.promote_types(grad.dtype, self.named[name].dtype)
            self._sums[name] = grad.to(wide)
