"""Frozen matrices of some blocks in the host's memory, brought to the device ahead of each of a block's passes.

Two such blocks are on the device at a time: the one at work, and the one that comes next in forward or backward. On a
GPU copies run on a stream of their own from page-locked memory. A matrix on the device is one storage all along, which
is emptied and filled again, so that what autograd has kept of it is valid in backward; FSDP2 does the same with what it
gathers. On a CPU the same steps are plain copies.

For one rank: ranks that share weights hold a part of each instead.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import _unsafe_preserve_version_counter

from sora_train.device.page_locked import locked
from sora_train.parallel.parallelize import sharding_units


class Swapped:
    """The frozen matrices of one block: on the host, and while they are needed on the device.

    Attributes:
        present: whether they are on the device, or on the way there.
    """

    def __init__(self, block: nn.Module, device: torch.device):
        self.weights = [_on_host(self, owner, name, device) for owner, name in _matrices(block)]
        self.hosts = [weight.data for weight in self.weights]
        self.present, self.arrived = False, None

    def to_device(self, device: torch.device) -> None:
        """From now on the weights are storages of the device, empty as yet."""
        for weight, host in zip(self.weights, self.hosts, strict=True):
            weight.data = torch.empty_like(host, device=device)
            weight.untyped_storage().resize_(0)

    def fetch(self, stream: Any) -> None:
        """Queue the copies to the device."""
        self.present = True
        for weight, host in zip(self.weights, self.hosts, strict=True):
            weight.untyped_storage().resize_(host.untyped_storage().nbytes())
        if stream is not None:
            # The memory may have been others' until now.
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.no_grad(), torch.cuda.stream(stream):
            for weight, host in zip(self.weights, self.hosts, strict=True):
                with _unsafe_preserve_version_counter(weight):
                    weight.copy_(host, non_blocking=True)
        self.arrived = stream.record_event() if stream is not None else None

    def wait(self) -> None:
        """Queue what comes behind the copies."""
        if self.arrived is not None:
            torch.cuda.current_stream(self.weights[0].device).wait_event(self.arrived)
            self.arrived = None

    def release(self) -> None:
        """Give the device's memory back, once what is queued is done with it."""
        self.wait()
        self.present = False
        for weight in self.weights:
            weight.untyped_storage().resize_(0)


class Swapper:
    """Which blocks are swapped, and which of them are on the device.

    Attributes:
        fetched: numbers of the swapped blocks, in the order in which they were copied to the device.
    """

    def __init__(self, blocks: list[nn.Module], device: torch.device):
        """The blocks' frozen matrices get memory on the host, with their values where they have any; until the first
        pass they can be filled there."""
        self.swapped = [Swapped(block, device) for block in blocks]
        self.device, self.begun = device, False
        self.fetched: list[int] = []
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for place, block in enumerate(blocks):
            block.forward = types.MethodType(_swapping(block.forward.__func__, self, place), block)

    def need(self, place: int, after: int) -> None:
        """A pass of the swapped block `place` begins, and that of `after` is the next."""
        if not self.begun:
            self.begun = True
            for each in self.swapped:
                each.to_device(self.device)
        for number, each in enumerate(self.swapped):
            if each.present and number not in (place, after):
                each.release()
        for number in (place, after):
            if not self.swapped[number].present:
                self.fetched.append(number)
                self.swapped[number].fetch(self._stream)
        self.swapped[place].wait()

    def forward(self, place: int) -> None:
        last = len(self.swapped) - 1
        turns = torch.is_grad_enabled() and place == last
        self.need(place, place - 1 if turns else (place + 1) % (last + 1))

    def backward(self, place: int) -> None:
        self.need(place, place - 1 if place else 1)


class _BackwardBegins(torch.autograd.Function):
    """Passes a block's result on, and in backward tells that its gradient is there."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, swapper: Swapper, place: int) -> Tensor:
        ctx.swapper, ctx.place = swapper, place
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        ctx.swapper.backward(ctx.place)
        return dy, None, None


def swap_blocks(model: nn.Module, count: int, device: torch.device) -> Swapper:
    """Let `count` blocks of `model`, spread evenly, have their frozen matrices on the host, in place.

    Blocks without memory get it there; nothing else is touched.
    """
    blocks = sharding_units(model)
    return Swapper([blocks[number * len(blocks) // count] for number in range(count)], device)


def _swapping(forward: Callable[..., Any], swapper: Swapper, place: int) -> Callable[..., Any]:
    def run(block: nn.Module, *inputs: Any) -> Any:
        swapper.forward(place)
        y = forward(block, *inputs)
        return _BackwardBegins.apply(y, swapper, place) if y.requires_grad else y

    return run


def _matrices(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Who holds a frozen matrix of a block, and under which name."""
    return [
        (owner, name)
        for owner in block.modules()
        for name, weight in owner.named_parameters(recurse=False)
        if weight.ndim == 2 and not weight.requires_grad
    ]


def _on_host(swapped: Swapped, owner: nn.Module, name: str, device: torch.device) -> nn.Parameter:
    """The parameter with host memory: itself, or a new one where it had no memory."""
    weight = owner.get_parameter(name)
    if device.type == "cuda":
        host = locked(swapped, weight.shape, weight.dtype)
    else:
        host = torch.empty(weight.shape, dtype=weight.dtype)
    if weight.is_meta:
        weight = nn.Parameter(host, requires_grad=False)
        setattr(owner, name, weight)
    else:
        weight.data = host.copy_(weight)
    return weight
