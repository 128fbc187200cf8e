"""Weights that are no numbers: NaN and infinities are named before a model is made of them."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from sora_train.errors import UserError


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is; without a copy of the tensor."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()
    # Either of the two is NaN where any value is.
    return all(math.isfinite(float(bound)) for bound in torch.aminmax(tensor.detach()))


def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str, remedy: str) -> None:
    """Raises UserError that names the first tensor with a value that is not finite, and how many it has."""
    for name, tensor in tensors:
        if not is_finite(tensor):
            count = tensor.numel() - int(tensor.detach().isfinite().sum())
            raise UserError(
                f"{where}: {name} holds {count} values of {tensor.numel()} that are NaN or infinite; {remedy}"
            )
