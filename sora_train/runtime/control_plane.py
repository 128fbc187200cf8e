"""The control plane: the small exchange that keeps all ranks in step."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sora_train.errors import Fault
from sora_train.runtime.world import MEETING, TIMEOUT, World, set_timeout

Built = TypeVar("Built")


class ControlPlane:
    """One small all-reduce on gloo before a step's first backward: true weights and flags.

    Every rank leaves it with the same numbers, so all of them take the same branch. The group is
    gloo's own, so it needs no GPU and never waits behind a kernel.
    """

    def __init__(self, world: World, timeout: timedelta = TIMEOUT):
        self.world = world
        self.group, self.peers = None, None
        """All ranks; and those that share this one's micro-batches, None where there is no other."""
        if world.size > 1:
            self.group = dist.new_group(backend="gloo", timeout=MEETING)
            set_timeout(timeout, self.group)
        if world.cp > 1:
            first = world.dp_rank * world.cp
            mine = list(range(first, first + world.cp))
            self.peers = dist.new_group(mine, MEETING, "gloo", use_local_synchronization=True)
            set_timeout(timeout, self.peers)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum each value over all ranks, in float64."""
        if self.group is None:
            return [float(value) for value in values]
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Each rank's values, in the order of the ranks; as many on every rank."""
        if self.group is None:
            return [[float(value) for value in values]]
        mine = torch.tensor(list(values), dtype=torch.float64)
        gathered = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(gathered, mine, group=self.group)
        return [rank.tolist() for rank in gathered]

    def gather_objects(self, value: object) -> list[object]:
        """Each rank's value, in the order of the ranks; for rare and small things."""
        if self.group is None:
            return [value]
        gathered: list[object] = [None] * self.world.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def gather_from_peers(self, value: object) -> list[Any]:
        """The values of the ranks that share this one's micro-batches, in the order of their `cp_rank`."""
        if self.peers is None:
            return [value]
        gathered: list[Any] = [None] * self.world.cp
        dist.all_gather_object(gathered, value, group=self.peers)
        return gathered

    def broadcast(self, value: object) -> object:
        """The value rank 0 holds, on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def together(self, build: Callable[[], Built]) -> Built:
        """`build()` on every rank, or an error on all of them if it failed on any."""
        built: list[Built] = []
        error: Exception | None = None
        try:
            built.append(build())
        except Exception as failure:
            error = failure
        self.raise_together(error)
        return built[0]

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank if any rank failed, so that no rank is left waiting for another."""
        failed = self.sum([1.0 if error is not None else 0.0])[0]
        if error is not None:
            raise error
        if failed:
            raise Fault(f"{int(failed)} other rank(s) failed; their messages are in their own logs")
