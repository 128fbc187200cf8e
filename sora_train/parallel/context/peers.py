"""Ranks that hold copies of one micro-batch run its frozen networks once, each on a part of the clips."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from sora_train.errors import Fault
from sora_train.parallel.context.collectives import gather
from sora_train.parallel.context.context import ContextGroups
from sora_train.runtime.control_plane import ControlPlane

Item = TypeVar("Item")


class ContextParallelSharing:
    """A `WorkSharing` among the ranks of this one's context-parallel group; without groups a rank is alone.

    Item i is worked on by rank i modulo `parts`, and all ranks leave with the same bits.
    """

    def __init__(self, control: ControlPlane, groups: ContextGroups | None):
        self.control, world = control, control.world
        self.parts, self.rank, self.device = world.cp, world.cp_rank, world.device
        self._group: Any = groups.whole if groups else None

    def __call__(self, items: Sequence[Item], work: Callable[[Item], Tensor]) -> list[Tensor]:
        """Raises what the work raised here, or Fault where it failed on another rank."""
        if self._group is None or not items:
            return [work(item) for item in items]
        mine: list[Tensor] = []
        error: Exception | None = None
        try:
            mine += [work(item) for item in items[self.rank :: self.parts]]
        except Exception as failure:
            error = failure
        sizes = None if error else [(tuple(one.shape), one.dtype) for one in mine]
        facts = self.control.gather_from_peers(sizes)
        if error is not None:
            raise error
        if None in facts:
            rank = self.control.world.dp_rank * self.parts + facts.index(None)
            raise Fault(
                f"rank {rank}, which shares its clips with this one, failed; its own log says why"
            )
        return self._exchanged(mine, facts, len(items))

    def _exchanged(
        self, mine: list[Tensor], facts: list[list[tuple[tuple[int, ...], torch.dtype]]], count: int
    ) -> list[Tensor]:
        """All ranks' results in the order of the items. Raw bytes travel, so nothing is rounded."""
        packed = [one.contiguous().view(-1).view(torch.uint8) for one in mine]
        whole = torch.cat([torch.empty(0, dtype=torch.uint8, device=self.device), *packed])
        sizes = [
            [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in of_rank]
            for of_rank in facts
        ]
        parts = gather(whole, [(sum(own),) for own in sizes], self._group)
        found = [
            # A copy stands at an address that any dtype may be read from.
            [
                piece.clone().view(dtype).view(shape)
                for piece, (shape, dtype) in zip(part.split(own), of_rank, strict=True)
            ]
            for part, own, of_rank in zip(parts, sizes, facts, strict=True)
        ]
        return [found[item % self.parts][item // self.parts] for item in range(count)]
