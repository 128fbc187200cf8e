"""Host memory that a GPU copies from and to by itself, in exactly the sizes asked for.

PyTorch's own allocator of such memory rounds up to powers of two: 30 tensors of 2.2 GB would take 129 GB. Its setting
that does not round hands out blocks that are too small (github.com/pytorch/pytorch/pull/192722), so large buffers are
locked here, through the driver.
"""

import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from sora_train.errors import Fault

SMALLEST = 1 << 20
"""Bytes; what is smaller is PyTorch's: it may share its pages with others."""


def locked(owner: object, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros whose pages are locked for as long as `owner` lives.

    Raises Fault where the machine does not lock so much.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < SMALLEST:
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=True)
    # Every page is written to first, by all threads: the driver would do it with one.
    tensor = torch.empty(tuple(shape), dtype=dtype).zero_()
    code = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 0))
    if code:
        raise Fault(
            f"the driver does not lock {size / 2**30:.3g} GiB of host memory (CUDA error {code}); give the job more "
            "memory, or set ulimit -l unlimited"
        )
    # Nothing is left to unlock when the process ends.
    weakref.finalize(owner, _unlock, tensor).atexit = False
    return tensor


def _unlock(tensor: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


class LockedPool:
    """Locked buffers that are used again and again, each by one holder at a time.

    Holders copy on one stream, so that what is read from a buffer is read before the next holder's copy into it.
    """

    SLACK = 1.25
    """How much larger than asked for a buffer may be, and the whole pool than it ever had to be."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._owners: dict[int, _Owner] = {}
        self.total = self.used = self.most_used = 0
        """Bytes locked, in use, and in use at the height."""

    def take(self, size: int, holder: object) -> Tensor:
        """`size` bytes (uint8) until `holder` is gone."""
        fitting = [b for b in self._free if size <= b.numel() <= self.SLACK * size]
        if fitting:
            buffer = min(fitting, key=Tensor.numel)
            self._free = [free for free in self._free if free is not buffer]
        else:
            buffer = self._make(size)
        self.used += buffer.numel()
        self.most_used = max(self.most_used, self.used)
        weakref.finalize(holder, self._give_back, buffer).atexit = False
        return buffer[:size]

    def _make(self, size: int) -> Tensor:
        limit = self.SLACK * max(self.most_used, self.used + size)
        while self._free and self.total + size > limit:
            given_up = self._free.pop(0)
            # Copies from it may still be queued.
            torch.cuda.synchronize()
            self.total -= given_up.numel()
            del self._owners[given_up.data_ptr()]
        owner = _Owner()
        buffer = locked(owner, (size,), torch.uint8)
        self._owners[buffer.data_ptr()] = owner
        self.total += size
        return buffer

    def _give_back(self, buffer: Tensor) -> None:
        self.used -= buffer.numel()
        self._free.append(buffer)


class _Owner:
    """Whose end unlocks a buffer of the pool."""
