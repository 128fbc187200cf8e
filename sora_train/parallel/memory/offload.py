"""Activations in the host's memory: what a block saves leaves the device behind its forward pass and comes
back a block ahead of its backward pass.

Whole storages travel, so that tensors which share one travel once. What lives on anyway stays: weights,
what all blocks are given (captions, modulation, rotary table, mask), and what is small. On a GPU copies
run on a stream of their own from and to page-locked memory; a block's originals are let go when the next
block's forward pass has been queued behind their copies, so those of the last block, whose backward pass
comes first, are still there. On a CPU the same steps are plain copies.
"""

import contextlib
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from sora_train.device.page_locked import LockedPool
from sora_train.parallel.parallelize import sharding_units

SMALLEST = 1024
"""Bytes; what is smaller stays where it is."""

Key = tuple[int, int]
"""Address and version of a storage."""


@dataclass(eq=False)
class Stored:
    """One storage that a block saves: on the host, and as long or as soon as it is there, on the device."""

    stash: "Stash"
    host: Tensor
    device: Tensor | None


@dataclass
class Saved:
    """What autograd holds in the place of a tensor."""

    stored: Stored
    dtype: torch.dtype
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


@dataclass(eq=False)
class Stash:
    """What one forward pass of one block saves. Autograd's own references keep it and its storages alive, nothing
    else does: each is freed as soon as the backward pass is done with it."""

    before: "weakref.ref[Stash] | None"
    after: "weakref.ref[Stash] | None" = None
    stored: "weakref.WeakValueDictionary[Key, Stored]" = field(
        default_factory=weakref.WeakValueDictionary
    )
    event: Any = None
    """The end of the last copies, on a GPU."""
    begun: bool = False
    """Whether its backward pass has begun."""


class Offloader:
    """The stashes of a model's blocks, and the stream on which they are copied.

    Attributes:
        bytes_moved: to the host, since it was made.
    """

    def __init__(self) -> None:
        self.bytes_moved = 0
        self._pool = LockedPool()
        self._newest: weakref.ref[Stash] | None = None
        self._stream: Any = None

    @contextlib.contextmanager
    def block(self, stays: set[int]) -> Iterator[None]:
        """Inside the block what autograd saves goes to the host, but for storages at the addresses `stays`."""
        previous = self._newest() if self._newest else None
        stash = Stash(weakref.ref(previous) if previous else None)
        if previous:
            previous.after = weakref.ref(stash)
        self._newest = weakref.ref(stash)
        with saved_tensors_hooks(lambda tensor: self._pack(stash, stays, tensor), self._unpack):
            yield
        if stash.stored and self._stream is not None:
            stash.event = self._stream.record_event()
        if previous and not previous.begun:
            self._let_go(previous)

    def _pack(self, stash: Stash, stays: set[int], tensor: Tensor) -> Tensor | Saved:
        storage = tensor.untyped_storage()
        if storage.nbytes() < SMALLEST or storage.data_ptr() in stays:
            return tensor
        key = (storage.data_ptr(), tensor._version)
        stored = stash.stored.get(key)
        if stored is None:
            # The original is held, so its address is no other storage's until it is let go.
            original = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            stored = stash.stored[key] = Stored(stash, original, original)
            stored.host = self._to_host(original, stored)
            self.bytes_moved += storage.nbytes()
        return Saved(stored, tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())

    def _unpack(self, saved: Tensor | Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        stash = saved.stored.stash
        if not stash.begun:
            self._begin(stash)
        if saved.stored.device is None:
            # A second backward pass through the same graph.
            self._fetch(stash)
        whole = saved.stored.device
        assert whole is not None
        self._wait(stash, whole)
        back = torch.empty(0, dtype=saved.dtype, device=whole.device)
        return back.set_(whole.untyped_storage(), saved.offset, saved.size, saved.stride)

    def _begin(self, stash: Stash) -> None:
        """The backward pass of a block begins: let go of the one behind it, fetch the one before it."""
        stash.begun = True
        after = stash.after() if stash.after else None
        if after:
            self._let_go(after)
        self._fetch(stash)
        before = stash.before() if stash.before else None
        if before and not before.begun:
            self._fetch(before)

    # -- copies ---------------------------------------------------------------------------------

    def _to_host(self, original: Tensor, stored: Stored) -> Tensor:
        if not original.is_cuda:
            return original.clone()
        host = self._pool.take(original.numel(), stored)
        if self._stream is None:
            self._stream = torch.cuda.Stream(original.device)
        self._stream.wait_stream(torch.cuda.current_stream(original.device))
        with torch.cuda.stream(self._stream):
            host.copy_(original, non_blocking=True)
        # Autograd may drop the original before the copy has been made.
        original.record_stream(self._stream)
        return host

    def _fetch(self, stash: Stash) -> None:
        """Queue the copies to the device of what is not there."""
        absent = [stored for stored in stash.stored.values() if stored.device is None]
        if self._stream is None:
            for stored in absent:
                stored.device = stored.host.clone()
            return
        with torch.cuda.stream(self._stream):
            for stored in absent:
                stored.device = stored.host.to(self._stream.device, non_blocking=True)
        if absent:
            stash.event = self._stream.record_event()

    def _wait(self, stash: Stash, tensor: Tensor) -> None:
        if stash.event is not None:
            current = torch.cuda.current_stream(tensor.device)
            current.wait_event(stash.event)
            tensor.record_stream(current)

    def _let_go(self, stash: Stash) -> None:
        """Free what is on the device, once the copies of it that are queued are done."""
        if stash.event is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(stash.event)
        for stored in stash.stored.values():
            stored.device = None


def offload_blocks(model: nn.Module) -> Offloader:
    """Let every block of `model` save what its backward pass needs on the host, in place."""
    offloader = Offloader()
    for block in sharding_units(model):
        block.forward = types.MethodType(_offloaded(block.forward.__func__, offloader), block)
    return offloader


def _offloaded(forward: Callable[..., Any], offloader: Offloader) -> Callable[..., Any]:
    def run(block: nn.Module, x: Tensor, *rest: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(block, x, *rest)
        shared = [value for value in (*rest, *block.parameters()) if isinstance(value, Tensor)]
        with offloader.block({value.untyped_storage().data_ptr() for value in shared}):
            return forward(block, x, *rest)

    return run
