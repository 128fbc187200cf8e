"""The cells of the parity matrix: layouts x accumulation x optimizer, and what each is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass

from sora_train.errors import UserError

STEPS = 5
ACCUMULATIONS = (1, 3)
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "sgd": ("optim=sgd", "optim.lr=0.05", "optim.grad_clip=0", "optim.warmup_steps=0"),
    # Clipping at 0.1 acts in every step; the norms are some tenths.
    "adamw": (
        "optim=adamw",
        "optim.lr=1e-3",
        "optim.grad_clip=0.1",
        "optim.warmup_steps=2",
        "optim.eps=1e-4",
        "optim.text_lr_scale=0.5",
        "optim.weight_decay=0.1",
    ),
    "muon": (
        "optim=adamw",
        "optim.name=muon",
        "optim.lr=5e-3",
        "optim.momentum=0.8",
        "optim.grad_clip=0.1",
        "optim.warmup_steps=2",
        "optim.eps=1e-4",
        "optim.lr_scales={transformer.blocks.*.attn2.*:2}",
        "optim.weight_decay=0.1",
    ),
    "schedule_free": (
        "optim=adamw",
        "optim.name=schedule_free",
        "optim.lr=1e-3",
        "optim.grad_clip=0.1",
        "optim.warmup_steps=2",
        "optim.eps=1e-4",
        "optim.weight_decay=0.1",
    ),
}
"""Plain SGD without clipping, since AdamW and clipping both hide a wrong gradient scale; and others with it."""
USUAL = ("sgd", "adamw")
COMMON = (
    "experiment=parity_tiny",
    f"train.steps={STEPS}",
    "validation.every=0",
    "checkpoint.every=0",
    "parallel.self_test=false",
)


@dataclass(frozen=True)
class ParityLayout:
    """A way to divide the work over ranks."""

    name: str
    world: int
    overrides: tuple[str, ...] = ()
    cp: int = 1

    @property
    def zero(self) -> bool:
        return self.name.startswith("zero")

    def dtype(self, requested: str) -> str:
        """`auto`: float64, or float32 for ZeRO, whose masters are float32."""
        if requested != "auto":
            return requested
        return "float32" if self.zero else "float64"


def _fsdp(*overrides: str) -> tuple[str, ...]:
    return tuple(f"parallel.{override}" for override in overrides)


LAYOUTS = {
    layout.name: layout
    for layout in (
        ParityLayout("single", 1),
        ParityLayout("ddp x2", 2, _fsdp("dp_replicate=2")),
        ParityLayout("fsdp x2", 2, _fsdp("dp_shard=2")),
        ParityLayout("hsdp 2x2", 4, _fsdp("dp_replicate=2", "dp_shard=2")),
        ParityLayout("zero1 x2", 2, _fsdp("engine=zero1")),
        ParityLayout("zero2 x2", 2, _fsdp("engine=zero2")),
        ParityLayout("zero3 x2", 2, _fsdp("engine=zero3")),
        ParityLayout("ulysses 2", 2, _fsdp("ulysses=2"), 2),
        ParityLayout("ring 2", 2, _fsdp("ring=2"), 2),
        ParityLayout("ulysses 2 x ring 2", 4, _fsdp("ulysses=2", "ring=2"), 4),
        ParityLayout("fsdp x2 x ulysses 2", 4, _fsdp("dp_shard=2", "ulysses=2"), 2),
        ParityLayout(
            "zero2 x2 x ulysses 2", 4, _fsdp("engine=zero2", "dp_shard=2", "ulysses=2"), 2
        ),
    )
}

TOLERANCE = {"float64": 1e-10, "float32": 2e-6, "bfloat16": 5e-2}
"""Largest relative difference of losses, norms and parameters, by the dtype of compute."""


@dataclass(frozen=True)
class Cell:
    """One run: a layout, micro-batches of each rank in a step, an optimizer, a dtype of compute."""

    layout: ParityLayout
    accumulation: int
    optimizer: str
    dtype: str
    idle: int = 0
    """Slots without a micro-batch, in every step."""

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step, on all ranks together."""
        return self.accumulation * self.layout.world // self.layout.cp - self.idle

    @property
    def name(self) -> str:
        return f"{self.layout.name}, {self.micro_batches} micro-batches, {self.optimizer}, {self.dtype}"

    @property
    def folder(self) -> str:
        return self.name.replace(" ", "_").replace(",", "")

    @property
    def reference(self) -> "Cell":
        """The same micro-batches in one process."""
        return Cell(LAYOUTS["single"], self.micro_batches, self.optimizer, self.dtype)

    @property
    def overrides(self) -> list[str]:
        return [
            *COMMON,
            *OPTIMIZERS[self.optimizer],
            *self.layout.overrides,
            f"train.micro_batches={self.micro_batches}",
            f"parallel.param_dtype={self.dtype}",
        ]


def chosen(names: Sequence[str]) -> list[ParityLayout]:
    """Layouts by name; all where none is named. Raises UserError for an unknown name, with the known ones."""
    unknown = [name for name in names if name not in LAYOUTS]
    if unknown:
        raise UserError(f"--layouts has no '{unknown[0]}'; there are: {', '.join(LAYOUTS)}")
    return [LAYOUTS[name] for name in names] if names else list(LAYOUTS.values())


def matrix(
    layouts: Sequence[ParityLayout],
    dtype: str = "auto",
    accumulations: Sequence[int] = ACCUMULATIONS,
    optimizers: Sequence[str] = USUAL,
) -> list[Cell]:
    """The cells of these layouts; `references` are what they are compared with. ZeRO has no Muon."""
    return [
        Cell(layout, accumulation, optimizer, layout.dtype(dtype))
        for layout in layouts
        for accumulation in accumulations
        for optimizer in optimizers
        if not (layout.zero and optimizer == "muon")
    ]


def with_references(cells: Sequence[Cell]) -> list[Cell]:
    """These cells and their references, each once, one process first."""
    cells_and_references = dict.fromkeys([*(cell.reference for cell in cells), *cells])
    return sorted(cells_and_references, key=lambda cell: cell.layout.world)
