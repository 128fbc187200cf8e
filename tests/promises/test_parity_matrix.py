"""Promise 1: the same losses, norms and weights in every layout, and as many bytes as the formula says.

What was broken on purpose, and is seen: tests/mutants/areas/layouts.yaml.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from sora_train.errors import UserError
from sora_train.tools.doctor.parity.layouts import (
    LAYOUTS,
    OPTIMIZERS,
    Cell,
    chosen,
    matrix,
    with_references,
)
from sora_train.tools.doctor.parity.parity import (
    MatrixSelection,
    compare,
    compare_chain,
    document,
    launches,
    run,
    sections_after,
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
    cell("hsdp 2x2", 1, "muon"),
    cell("fsdp x2", 1, "schedule_free"),
]  # fmt: skip


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
    cells = [
        one for one in matrix(chosen([]), optimizers=tuple(OPTIMIZERS)) if one.layout.world > 1
    ]
    run(tmp_path, launches(with_references(cells), chain=True), progress=False)
    require(tmp_path, cells)
    assert compare_chain(tmp_path).agrees


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


def test_the_table_is_written_anew_and_the_sections_after_it_stay(tmp_path: Path) -> None:
    page = tmp_path / "parity.md"
    assert sections_after(page) == ""
    table, section = document([], "sora doctor parity"), "\n## Small breaks\n\ntext\n\n## More\n"
    page.write_text(table + section)
    assert sections_after(page) == section and sections_after(page) not in table
