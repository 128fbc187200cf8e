"""Promise 1 for adapters: beside the same frozen base every layout trains one process's adapter, dropout included."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sora_train.tools.doctor.parity.layouts import COMMON, LAYOUTS, OPTIMIZERS, TOLERANCE
from sora_train.tools.doctor.parity.parity import NUMBERS, apart, cell_plan, run, weights_apart

STEPS = 4
ADAPTER = (
    "adapter.rank=4",
    "adapter.alpha=6",
    "adapter.targets=[attention+mlp]",
    "adapter.dropout=0.2",
)
KINDS = (("sgd", ()), ("adamw", ("adapter.dora=true",)))
"""Beside a young base gradients are small, so plain SGD takes long steps."""
FAST = ("ddp x2", "fsdp x2", "ulysses 2", "ring 2", "zero2 x2")


@dataclass(frozen=True)
class AdapterCell:
    layout: str
    optimizer: str = "sgd"
    further: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        return "float32" if self.layout.startswith("zero") else "float64"

    @property
    def folder(self) -> str:
        words = [self.layout, self.optimizer, self.dtype, *self.further]
        return "-".join(words).replace(" ", "-").replace("=", "-")

    @property
    def reference(self) -> "ReferenceCell":
        return ReferenceCell("single", self.optimizer, self.further, self.dtype)

    def plan(self, folder: Path) -> dict:
        overrides = [
            *COMMON, *OPTIMIZERS[self.optimizer], *LAYOUTS[self.layout].overrides, *ADAPTER, *self.further,
            f"train.steps={STEPS}", "train.micro_batches=3", f"parallel.param_dtype={self.dtype}",
            f"init.run={folder / 'base'}", *(["optim.lr=20"] if self.optimizer == "sgd" else []),
        ]  # fmt: skip
        return cell_plan(self.folder, overrides, STEPS)


@dataclass(frozen=True)
class ReferenceCell(AdapterCell):
    of_dtype: str = "float64"

    @property
    def dtype(self) -> str:
        return self.of_dtype


def trained(folder: Path, cells: list[AdapterCell]) -> None:
    """Train the base, then every reference and every cell."""
    base = cell_plan("base", [*COMMON, *OPTIMIZERS["sgd"], "train.steps=3"], 2)
    starts = [{"world": 1, "cells": [base]}]
    every = list(dict.fromkeys([*(cell.reference for cell in cells), *cells]))
    for world in sorted({LAYOUTS[cell.layout].world for cell in every}):
        of_world = [cell.plan(folder) for cell in every if LAYOUTS[cell.layout].world == world]
        starts.append({"world": world, "cells": of_world})
    run(folder, starts, progress=False)


def require_one_process(folder: Path, cells: list[AdapterCell]) -> None:
    wrong = []
    for cell in cells:
        own, one = folder / cell.folder, folder / cell.reference.folder
        rows, expected = (json.loads((it / "result.json").read_text())["rows"] for it in (own, one))
        worst = max(*(apart(rows, expected, key) for key in NUMBERS), weights_apart(own, one))
        if not worst <= TOLERANCE[cell.dtype]:
            wrong.append((cell.folder, worst))
        assert all(".lora_" in name for name in torch.load(own / "weights.pt")), (
            "the base is no state of the run"
        )
    assert not wrong


@pytest.mark.timeout(600)
def test_layouts_train_the_adapter_of_one_process(tmp_path: Path) -> None:
    cells = [*map(AdapterCell, FAST), AdapterCell("fsdp x2", *KINDS[1])]
    trained(tmp_path, cells)
    require_one_process(tmp_path, cells)
    # Adapters that had not moved would agree too: going in, they begin with the same values everywhere.
    sgd, adamw = (AdapterCell("single", kind, further).folder for kind, further in KINDS)
    sgd, adamw = (torch.load(tmp_path / of / "weights.pt") for of in (sgd, adamw))
    moved = [float((sgd[name] - adamw[name]).abs().max()) for name in sgd if ".lora_A." in name]
    assert max(moved) > 1e-5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_layout_trains_the_adapter_of_one_process(tmp_path: Path) -> None:
    kinds: tuple[tuple[str, ...], ...] = ((), ("adapter.dora=true",), ("adapter.rslora=true",))
    cells = [
        AdapterCell(name, optimizer, further)
        for name in LAYOUTS
        if LAYOUTS[name].world > 1
        for optimizer in OPTIMIZERS
        for further in kinds
    ]
    trained(tmp_path, cells)
    require_one_process(tmp_path, cells)
