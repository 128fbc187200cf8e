"""A rank's part of a tensor: of a DTensor, which FSDP2 makes, or of one that is cut flat, which ZeRO makes.

A flat part is a run of the tensor's values in row-major order, wherever rows begin and end. Torch's
distributed checkpoint stores boxes only (offsets and sizes along each dimension). A flat run of a tensor of
n dimensions is at most 2 n - 1 boxes, each a contiguous view of the run, so flat parts are written and loaded
in place and nothing is gathered.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The boxes that values `start` up to `stop` of a row-major tensor fill, in their order."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        # Within one row.
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], number: int, start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in boxes(shape[1:], start, stop):
        yield (number, *offsets), (1, *sizes)


class FlatShard(Tensor):
    """Shape and type of a whole tensor, and this rank's run of its values.

    It is a description to be saved, loaded and averaged by, not to compute with: that is refused.
    """

    part: Tensor
    """This rank's values, one-dimensional; may be empty."""
    start: int
    """The place of the first of them."""

    @staticmethod
    def __new__(cls, part: Tensor, shape: Sequence[int], start: int) -> "FlatShard":
        found: FlatShard = Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=part.dtype, device=part.device
        )
        found.part, found.start = part.detach(), start
        return found

    def __init__(self, part: Tensor, shape: Sequence[int], start: int):
        """The values are shared with `part`."""

    def __repr__(self, *_: Any, **__: Any) -> str:
        stop = self.start + self.part.numel()
        return f"FlatShard({tuple(self.shape)}, values {self.start} to {stop})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0].placed(args[0].part)
        raise NotImplementedError(f"{func} of a FlatShard; take its to_local() or full()")

    def to_local(self) -> Tensor:
        return self.part

    def placed(self, part: Tensor) -> "FlatShard":
        """Other values of the same place."""
        return FlatShard(part, self.shape, self.start)

    def full(self) -> Tensor:
        """The whole tensor on every rank; a collective of all ranks."""
        whole = self.part.new_zeros(self.shape.numel())
        whole[self.start : self.start + self.part.numel()] = self.part
        dist.all_reduce(whole)
        return whole.view(self.shape)

    def boxes(self) -> list[Box]:
        return list(boxes(self.shape, self.start, self.start + self.part.numel()))

    # --- what the distributed checkpoint asks ---

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.part)
        return [
            WriteItem(
                MetadataIndex(fqn, torch.Size(chunk.offsets)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            for offsets, sizes in self.boxes()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        place = 0
        for offsets, sizes in self.boxes():
            values = math.prod(sizes)
            if index.offset == torch.Size(offsets):
                return self.part[place : place + values].view(sizes)
            place += values
        raise ValueError(f"{self!r} of {index.fqn} has no box at {index.offset}")


def piece(like: Tensor, part: Tensor, index: MetadataIndex) -> Tensor:
    """What `index` names of this rank's `part` of a tensor that lies as `like` does."""
    return like.placed(part).__get_tensor_shard__(index) if isinstance(like, FlatShard) else part


def placed_as(part: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a tensor that is sharded as `parameter` is, sharing memory with the part.

    Its rows are the parameter's; what a row holds may be of another shape.
    """
    if isinstance(parameter, FlatShard):
        return parameter.placed(part)
    if not isinstance(parameter, DTensor):
        return part
    whole = torch.Size((*parameter.shape[:1], *part.shape[1:]))
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=whole,
        stride=torch.empty(whole, device="meta").stride(),
    )


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank (a collective when it is sharded)."""
    if isinstance(tensor, FlatShard):
        return tensor.full()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor | FlatShard) else tensor
