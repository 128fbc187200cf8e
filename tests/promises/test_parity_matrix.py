"""Promise 1: the same losses, norms and weights in every layout, and as many bytes as the formula says.

Broken on purpose (parity_breaks.py), and seen: gradients averaged once too often; noise that is not keyed; ranks
of one clip with different noise; a parameter before the cut whose gradient lacks the other ranks' part; a norm
counted over replicas; gradients of keys and values that are passed round in the wrong order; the sign of the
log-sum-exp in the merge; a slot without clips whose loss leaks in. `test_each_break_is_seen` runs all of them.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from sora_train.errors import UserError
from sora_train.tools.doctor.parity.layouts import LAYOUTS, Cell, chosen, matrix, with_references
from sora_train.tools.doctor.parity.parity import (
    MatrixSelection,
    cell_plan,
    compare,
    compare_chain,
    launches,
    run,
    weights_apart,
)


def cell(layout: str, accumulation: int, optimizer: str, idle: int = 0) -> Cell:
    found = LAYOUTS[layout]
    return Cell(found, accumulation, optimizer, found.dtype("auto"), idle)


SHARDED = replace(
    cell("hsdp 2x2", 2, "adamw"),
    layout=replace(
        LAYOUTS["hsdp 2x2"],
        name="hsdp 2x2 accumulating shards",
        overrides=(*LAYOUTS["hsdp 2x2"].overrides, "parallel.accumulate=sharded"),
    ),
)
TRIMMED = [
    cell("ddp x2", 1, "sgd"),
    cell("fsdp x2", 2, "sgd", idle=1),
    cell("ulysses 2", 2, "sgd"),
    cell("ring 2", 2, "sgd"),
    SHARDED,
]  # fmt: skip
BREAKS = {
    "averaged_once_too_often": cell("fsdp x2", 1, "sgd"),
    "noise_not_keyed": cell("fsdp x2", 1, "sgd"),
    "cp_ranks_with_different_noise": cell("ulysses 2", 2, "sgd"),
    "reduce_missing_on_a_replicated_parameter": cell("ulysses 2", 2, "sgd"),
    "norm_counted_over_replicas": cell("ddp x2", 1, "sgd"),
    "ring_step_order_wrong": cell("ring 2", 2, "sgd"),
    "merge_sign_wrong": cell("ring 2", 2, "sgd"),
    "zero_weight_slot_leaks": cell("fsdp x2", 2, "sgd", idle=1),
}


def require(folder: Path, cells: list[Cell]) -> None:
    wrong = []
    for one in cells:
        result = compare(folder, one)
        if not (result.agrees and result.volume_agrees):
            wrong.append((one.name, result))
    assert not wrong


@pytest.mark.timeout(600)
def test_layouts_are_one_process(tmp_path: Path) -> None:
    """The trimmed matrix: each kind of FSDP2's layouts once, with a slot that has no micro-batch; test_deepspeed has
    those of ZeRO, test_context_parallel those of both kinds together."""
    run(tmp_path, launches(with_references(TRIMMED), chain=False), progress=False)
    require(tmp_path, TRIMMED)
    # The comparison could not fail if every run ended with the same weights.
    one, other = (TRIMMED[0].reference.folder, TRIMMED[1].reference.folder)
    assert weights_apart(tmp_path / one, tmp_path / other) > 1e-4


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_cell_is_one_process(tmp_path: Path) -> None:
    """The whole matrix, and a run that moves from layout to layout."""
    cells = [one for one in matrix(chosen([])) if one.layout.world > 1]
    run(tmp_path, launches(with_references(cells), chain=True), progress=False)
    require(tmp_path, cells)
    assert compare_chain(tmp_path).agrees


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_break_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    references = [one for one in with_references(list(BREAKS.values())) if one.layout.world == 1]
    starts = launches(references, chain=False)
    for name, one in BREAKS.items():
        starts.append({
            "world": 2, "breaks": f"parity_breaks:{name}", "cells": [cell_plan(name, one.overrides, 5)],
        })  # fmt: skip
    run(tmp_path, starts, progress=False)
    seen = {name: compare(tmp_path, one, name) for name, one in BREAKS.items()}
    assert not {name: result for name, result in seen.items() if result.agrees}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (MatrixSelection(layouts=("fsdp x3",)), "fsdp x2"),
        (MatrixSelection(optimizers=("lion",)), "adamw"),
        (MatrixSelection(accumulations=("0",)), "micro-batches"),
        (MatrixSelection(dtype="float16"), "bfloat16"),
        (MatrixSelection(layouts=("zero2 x2",), dtype="float64"), "float32 masters"),
    ],
)
def test_what_there_is_not_is_told(wanted: MatrixSelection, said: str) -> None:
    with pytest.raises(UserError, match=said):
        wanted.cells()
