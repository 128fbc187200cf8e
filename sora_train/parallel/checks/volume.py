"""What a step sends: bytes by collective, counted, and the formula for each layout.

Bytes are those of a collective's whole tensor, added up over all ranks: what an all-gather gives and what
goes into a reduce-scatter, an all-reduce, an all-to-all and a send. Groups of one rank move nothing.

A step of M micro-batches on R ranks, each rank working on A = M * cp / R of them, with s bytes a value
while computing, r while reducing (at least float32), S ranks that share weights (dp_shard * cp), n the
values of the weights with the first dimension of each filled up to a multiple of S:

    FSDP2        all-gather       R * 2 A n s            forward and backward, each unit once
                 reduce-scatter   R * n r                after the last backward, times A where
                                                         parallel.accumulate=sharded; both 0 where S = 1
                 all-reduce       R * n / S * r          over replicas; 0 where there are none
    Muon         all-to-all       R * 2 m r / S          its matrices' m values to their owners and back; 0 where S = 1
    ZeRO-1       all-reduce       R * N r                after the last backward; N values of weights, not filled up
    ZeRO-2       all-reduce       R * A N r              after every backward
    ZeRO-3       reduce-scatter   R * A N r              after every backward
    all three    all-gather       R * N s                after the step
    ulysses      all-to-all       8 L D s a block        q, k, v there and the answer back, each with its adjoint
    ring         send             2 L D s (r - 1) a block, keys and values forward
                                  2 L D (s (r - 1) + g r) a block, backward, with their gradients in g bytes
    leaving      all-to-all       2 cp L X g             the velocity's tokens on every rank, and the adjoint

L is a micro-batch's tokens (B * T * P), D the model's width, X the values of a token's velocity, g = max(4, s).
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from sora_train.config import Config
from sora_train.parallel.degrees import Degrees
from sora_train.parallel.parallelize import sharding_units

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "reduce", "broadcast", "all_to_all", "send")
"""What the formula tells of."""
SMALL = ("control", "frozen", "scalars")
"""Listed apart: the control plane's exchanges, what frozen networks have made, and sums of a few numbers, as those
that judge a step."""
FEW = 16

# Operator -> kind, and the number of the argument whose tensors are counted.
_OPS = {
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::allgather_": ("all_gather", 0),
    "c10d::allgather_coalesced_": ("all_gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allreduce_coalesced_": ("all_reduce", 0),
    "c10d::reduce_": ("reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::alltoall_base_": ("all_to_all", 1),
    "c10d::alltoall_": ("all_to_all", 1),
    "c10d::send": ("send", 0),
}


class CountedVolume(TorchDispatchMode):
    """Inside the block every collective of this thread and of its backward passes is counted, whoever calls it:
    FSDP2, DeepSpeed, our operators.

    Attributes:
        bytes: of this rank, by kind.
    """

    def __init__(self, control: Iterable[Any] = ()):
        """`control` are the process groups of the control plane."""
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self._control = {group.group_name for group in control if group is not None}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.name().partition(".")[0]
        if name in _OPS:
            self._count(*_OPS[name], args)
        if name.startswith("sora::"):
            # An operator of ours hides its collectives from modes; its Python does not.
            with self:
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, place: int, args: tuple) -> None:
        tensors = list(_tensors(args[place]))
        group = next(
            dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)
        )
        if group.size() == 1:
            return
        if group.group_name in self._control:
            kind = "control"
        elif all(tensor.dtype == torch.uint8 for tensor in tensors):
            kind = "frozen"
        elif kind == "all_reduce" and sum(tensor.numel() for tensor in tensors) <= FEW:
            kind = "scalars"
        self.bytes[kind] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from _tensors(part)


@dataclass(frozen=True)
class Slot:
    """A micro-batch that a rank works on."""

    clips: int
    frames: int
    """Latent frames."""
    tokens: int
    """Of a frame."""

    @property
    def all_tokens(self) -> int:
        return self.clips * self.frames * self.tokens


def units_of(model: nn.Module) -> list[list[torch.Size]]:
    """Shapes of the parameters of each unit that is gathered at once: the blocks, and what is left."""
    blocks = [list(unit.parameters()) for unit in sharding_units(model)]
    known = {id(parameter) for unit in blocks for parameter in unit}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [[parameter.shape for parameter in unit] for unit in [*blocks, rest]]


def expected_volume(
    cfg: Config,
    degrees: Degrees,
    units: list[list[torch.Size]],
    slots: list[Slot],
    param_dtype: torch.dtype,
) -> Counter[str]:
    """This rank's part of the formula for a step of these micro-batches; the sum over all ranks is exact.

    `units` are of the whole model (`units_of` before it is sharded).
    """
    size, wide = param_dtype.itemsize, max(4, param_dtype.itemsize)
    if cfg.parallel.engine == "fsdp":
        volume = fsdp_volume(cfg, degrees, units, len(slots), size, wide)
    else:
        volume = zero_volume(cfg.parallel.engine, units, len(slots), size, wide)
    for slot in slots:
        volume += context_volume(cfg, degrees, slot, size)
    return +volume


def fsdp_volume(
    cfg: Config,
    degrees: Degrees,
    units: list[list[torch.Size]],
    slots: int,
    size: int,
    wide: int,
) -> Counter[str]:
    parts = degrees.shards
    padded = sum(filled(shape, parts) for unit in units for shape in unit)
    volume: Counter[str] = Counter()
    if parts > 1:
        volume["all_gather"] = 2 * slots * padded * size
        reductions = slots if cfg.parallel.accumulate == "sharded" else 1
        volume["reduce_scatter"] = reductions * padded * wide
    if parts > 1 and cfg.optim.name == "muon":
        *blocks, rest = units
        matrices = [shape for unit in blocks for shape in unit if len(shape) == 2]
        # The patch embedding's kernel is over time, height and width; the mask's has one channel, and AdamW.
        matrices += [shape for shape in rest if len(shape) == 5 and shape[1] > 1]
        volume["all_to_all"] = 2 * sum(map(math.prod, matrices)) * wide // parts
    if degrees.dp_replicate > 1:
        volume["all_reduce"] = padded // parts * wide
    return volume


def filled(shape: torch.Size, parts: int) -> int:
    """Values of a tensor whose first dimension is filled up to a multiple of `parts`."""
    rows, *rest = shape or (1,)
    return -(-rows // parts) * parts * math.prod(rest)


def context_volume(cfg: Config, degrees: Degrees, slot: Slot, size: int) -> Counter[str]:
    """Of one micro-batch, whose tokens all ranks of a cp group share: a rank's equal part of the sum."""
    volume: Counter[str] = Counter()
    cp, ring, wide = degrees.cp, degrees.ring, max(4, size)
    if cp == 1:
        return volume
    model, tokens = cfg.model, slot.all_tokens
    values, blocks = tokens * model.dim, model.num_layers
    total: Counter[str] = Counter()
    if degrees.ulysses > 1:
        total["all_to_all"] += blocks * 8 * values * size
    if ring > 1:
        total["send"] += blocks * 2 * values * (2 * size * (ring - 1) + wide * ring)
    velocity = model.velocity_channels * math.prod(model.patch_size)
    total["all_to_all"] += 2 * cp * tokens * velocity * wide
    return Counter({kind: value / cp for kind, value in total.items()})


def zero_volume(
    engine: str, units: list[list[torch.Size]], slots: int, size: int, wide: int
) -> Counter[str]:
    """Of weights that ZeRO-3 keeps whole between steps, as it does below `stage3_param_persistence_threshold`."""
    values = sum(shape.numel() for unit in units for shape in unit)
    reduced = "reduce_scatter" if engine == "zero3" else "all_reduce"
    reductions = 1 if engine == "zero1" else slots
    return Counter({"all_gather": values * size, reduced: reductions * values * wide})
