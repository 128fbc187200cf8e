"""Copies between the host and a GPU that neither waits for: through page-locked memory, in the order of the stream.

`tensor.to(device)` of pageable memory, `float(tensor)` and `tensor.tolist()` all wait until the GPU has done what is
queued, and while the host waits nothing is queued behind it.
"""

from typing import Any

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; what is already there is given back as it is."""
    device = torch.device(device)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


class ToHost:
    """A copy of `tensor` on its way to the host; what is queued after it is not waited for."""

    def __init__(self, tensor: Tensor):
        tensor = tensor.detach()
        self._arrived: Any = None
        if tensor.is_cuda:
            self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._copy.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.current_stream(tensor.device).record_event()
        else:
            self._copy = tensor.clone()

    def read(self) -> Tensor:
        """The copy, once it is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy
