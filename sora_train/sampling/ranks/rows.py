"""A network whose batch is dealt out over ranks: guidance asks for two or three rows a clip, which need not meet."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from sora_train.parallel.context.collectives import gather
from sora_train.parallel.context.context import segments


class SharedRows:
    """`forward` on this rank's rows of every tensor it is given; all ranks leave with all rows.

    Every tensor of a call has the batch as its first dimension, and ranks call with equal values.
    """

    def __init__(self, forward: Callable[..., Tensor], group: Any):
        self.forward, self.group = forward, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        sizes = segments(len(args[0]), self.size)
        start = sum(sizes[: self.rank])
        # A rank without rows computes the first one: then it knows the shape of the others'.
        mine = slice(start, start + sizes[self.rank]) if sizes[self.rank] else slice(0, 1)
        args, kwargs = tree_map(
            lambda value: value[mine] if isinstance(value, Tensor) else value, (args, kwargs)
        )
        y = self.forward(*args, **kwargs)
        shapes = [(size, *y.shape[1:]) for size in sizes]
        return torch.cat(gather(y[: sizes[self.rank]], shapes, self.group))
