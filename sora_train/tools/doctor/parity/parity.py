"""The parity matrix: runs every cell, compares it with one process, and writes docs/parity.md.

A relative difference is max|a - b| / max|b| of a tensor, |a - b| / |b| of a number; of a cell the largest
over all steps and tensors is reported.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from sora_train.base.console import plain_console
from sora_train.base.progress import Progress
from sora_train.errors import Fault, UserError
from sora_train.tools.doctor.parity.layouts import (
    ACCUMULATIONS,
    COMMON,
    OPTIMIZERS,
    STEPS,
    TOLERANCE,
    USUAL,
    Cell,
    chosen,
    matrix,
    with_references,
)

SECONDS_A_CELL, SECONDS_A_LAUNCH = 90, 240
"""The deadline of a start grows with what it has to do."""
CHAIN = (
    ("fsdp x4", 4, ("parallel.dp_shard=4",)),
    ("zero2 x2", 2, ("parallel.engine=zero2",)),
    ("single", 1, ()),
    ("ulysses 2", 2, ("parallel.ulysses=2",)),
)
"""A run that moves from one layout to the next, two steps in each."""
CHAIN_NAME = " -> ".join(name for name, *_ in CHAIN)
NUMBERS = ("train/loss", "train/grad_norm")


@dataclass(frozen=True)
class CellResult:
    """A cell against one process: largest relative differences, and bytes of a step counted and by the formula."""

    name: str
    detail: str
    dtype: str
    loss: float
    norm: float
    weights: float
    counted: dict[str, float]
    expected: dict[str, float]

    @property
    def agrees(self) -> bool:
        # A NaN is no agreement.
        return all(value <= TOLERANCE[self.dtype] for value in (self.loss, self.norm, self.weights))

    @property
    def volume_agrees(self) -> bool:
        return self.moved == self.expected

    @property
    def moved(self) -> dict[str, float]:
        """Bytes of the collectives that the formula covers; small exchanges are counted apart."""
        from sora_train.parallel.checks.volume import KINDS

        return {kind: value for kind, value in self.counted.items() if kind in KINDS and value}


def launches(cells: Sequence[Cell], *, chain: bool) -> list[dict[str, Any]]:
    """What worker.py starts: one launch a world size, and one for each part of the chain."""
    starts = [
        {
            "world": world,
            "cells": [cell_plan(cell.folder, cell.overrides, STEPS) for cell in of_world],
        }
        for world, of_world in groupby(cells, key=lambda cell: cell.layout.world)
    ]
    if chain:
        steps = 2 * len(CHAIN)
        same = [
            *COMMON,
            *OPTIMIZERS["adamw"],
            f"train.steps={steps}",
            "train.micro_batches=4",
            "parallel.param_dtype=float32",
        ]
        starts.append({"world": 1, "cells": [cell_plan("straight", same, steps)]})
        for part, (_, world, overrides) in enumerate(CHAIN):
            until = 2 * (part + 1)
            part_of = cell_plan("chain", [*same, *overrides], until, f"result-{part}.json")
            starts.append({"world": world, "cells": [part_of]})
    return starts


def cell_plan(
    folder: str, overrides: list[str], until: int, result_file: str = "result.json"
) -> dict[str, Any]:
    return {"folder": folder, "overrides": overrides, "until": until, "result": result_file}


def run(folder: Path, starts: list[dict[str, Any]], *, progress: bool = True) -> None:
    """Train everything in one process whose forks are the ranks.

    Raises:
        Fault: a rank failed, or the deadline is over; nothing is left running.
    """
    total = sum(len(start["cells"]) for start in starts)
    plan = folder / "plan.json"
    plan.write_text(json.dumps({"folder": str(folder), "launches": starts}))
    deadline = time.monotonic() + SECONDS_A_LAUNCH * len(starts) + SECONDS_A_CELL * total
    command = [sys.executable, "-m", "sora_train.tools.doctor.parity.worker", str(plan)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    with (
        (folder / "log").open("w") as log,
        Progress(total, "parity", enabled=progress) as bar,
        # A session of its own, so that its ranks end with it.
        subprocess.Popen(
            command, stdout=log, stderr=log, env=environ, start_new_session=True
        ) as worker,
    ):
        try:
            while worker.poll() is None:
                done = folder / "done"
                bar.update(len(done.read_text().splitlines()) if done.exists() else 0)
                if time.monotonic() > deadline:
                    raise Fault(f"the parity runs are not done in time; {last_errors(folder)}")
                time.sleep(0.3)
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
    if worker.returncode:
        raise Fault(f"the parity runs failed; {last_errors(folder)}")


def last_errors(folder: Path) -> str:
    """The last error lines of the first rank that failed."""
    logs = sorted(folder.glob("log*"), key=lambda path: path.stat().st_mtime)
    lines = [
        line
        for log in logs
        for line in log.read_text().splitlines()
        if "Error" in line or "Fault" in line
    ]
    return " / ".join(dict.fromkeys(lines[-4:])) or f"see {folder}"


def relative(value: float, expected: float) -> float:
    return abs(value - expected) / max(abs(expected), 1e-30)


def apart(rows: Sequence[dict], expected: Sequence[dict], key: str) -> float:
    """Largest relative difference over the steps; infinite where they are not the same steps."""
    if len(rows) != len(expected) or not rows:
        return float("inf")
    return max(relative(a[key], b[key]) for a, b in zip(rows, expected, strict=True))


def weights_apart(folder: Path, expected: Path) -> float:
    """max|a - b| / max|b| of each tensor, the largest of them.

    A bias of keys adds nearly the same to all scores of a query, which a softmax does not see: its gradient is sums
    that cancel, and more of their digits than of others. It is measured by the queries' bias where that is larger.
    """
    import torch

    mine, theirs = torch.load(folder / "weights.pt"), torch.load(expected / "weights.pt")
    if mine.keys() != theirs.keys():
        return float("inf")
    worst = 0.0
    for name, value in theirs.items():
        sibling = theirs[name.replace("to_k.bias", "to_q.bias")]
        scale = max(1e-30, *(float(tensor.double().abs().max()) for tensor in (value, sibling)))
        difference = float((mine[name].double() - value.double()).abs().max()) / scale
        # A NaN wins.
        worst = difference if not difference <= worst else worst
    return worst


def compare(folder: Path, cell: Cell, place: str = "") -> CellResult:
    """A cell against its reference; `place` where it did not run in its own folder."""
    own, one = folder / (place or cell.folder), folder / cell.reference.folder
    result, expected = (json.loads((place / "result.json").read_text()) for place in (own, one))
    loss, norm = (apart(result["rows"], expected["rows"], key) for key in NUMBERS)
    return CellResult(
        cell.layout.name,
        f"{cell.accumulation} x {cell.optimizer}",
        cell.dtype,
        loss,
        norm,
        weights_apart(own, one),
        result["counted"],
        result["expected"],
    )


def compare_chain(folder: Path) -> CellResult:
    straight = json.loads((folder / "straight" / "result.json").read_text())["rows"]
    rows: list[dict] = []
    for part in range(len(CHAIN)):
        rows += json.loads((folder / "chain" / f"result-{part}.json").read_text())["rows"]
    loss, norm = (apart(rows, straight, key) for key in NUMBERS)
    weights = weights_apart(folder / "chain", folder / "straight")
    return CellResult(CHAIN_NAME, "resumed, adamw", "float32", loss, norm, weights, {}, {})


@dataclass(frozen=True)
class MatrixSelection:
    """Which part of the matrix; everything by default."""

    layouts: tuple[str, ...] = ()
    accumulations: tuple[str, ...] = tuple(map(str, ACCUMULATIONS))
    optimizers: tuple[str, ...] = USUAL
    dtype: str = "auto"

    def cells(self) -> list[Cell]:
        """The selected cells. Raises UserError for an unknown name, with the known ones."""
        if self.dtype not in ("auto", *TOLERANCE):
            raise UserError(f"--dtype={self.dtype} is none of {', '.join(('auto', *TOLERANCE))}")
        for name in self.optimizers:
            if name not in OPTIMIZERS:
                raise UserError(f"--optimizers has no '{name}'; there are: {', '.join(OPTIMIZERS)}")
        for count in self.accumulations:
            if not count.isdecimal() or count == "0":
                raise UserError(
                    f"--accumulations has '{count}', which is no number of micro-batches"
                )
        layouts = [
            layout
            for layout in chosen(self.layouts)
            if layout.world > 1 and not (layout.zero and self.dtype == "float64")
        ]
        if not layouts:
            raise UserError(
                "nothing is left to compare: 'single' is what the others are compared with, and ZeRO keeps float32 "
                "masters, so it has no --dtype=float64"
            )
        counts = [int(count) for count in self.accumulations]
        cells = matrix(layouts, self.dtype, counts, self.optimizers)
        if self.dtype == "auto":
            cells += matrix(layouts, "bfloat16", counts[:1], self.optimizers[:1])
        return cells


def parity(selection: MatrixSelection, out: Path | None = None, command: str = "") -> bool:
    """Run the matrix, print its table, write it to `out`; returns whether everything agrees.

    Raises:
        UserError: a layout, optimizer or dtype that there is not.
    """
    cells = selection.cells()
    chain = not selection.layouts and selection.dtype in ("auto", "float32")
    with tempfile.TemporaryDirectory(prefix="sora-parity-") as made:
        folder = Path(made)
        run(folder, launches(with_references(cells), chain=chain))
        results = [compare(folder, cell) for cell in cells]
        results += [compare_chain(folder)] if chain else []
    plain_console(width=200).print(table(results))
    if out is not None:
        from sora_train.base.files import write_atomically

        write_atomically(out, document(results, command) + sections_after(out))
    return all(result.agrees and result.volume_agrees for result in results)


COLUMNS = (
    "layout",
    "micro-batches a rank",
    "dtype",
    "loss",
    "gradient norm",
    "weights",
    "agrees",
    "bytes of a step, all ranks",
)


def cells_of(result: CellResult) -> tuple[str, ...]:
    return (
        result.name,
        result.detail,
        result.dtype,
        f"{result.loss:.1e}",
        f"{result.norm:.1e}",
        f"{result.weights:.1e}",
        "yes" if result.agrees else f"NO, {TOLERANCE[result.dtype]:g} is allowed",
        volume(result),
    )


def volume(result: CellResult) -> str:
    """Bytes by collective, and what the formula says where it says otherwise."""
    text = ", ".join(f"{kind} {value:,.0f}" for kind, value in result.moved.items())
    if result.volume_agrees:
        return text
    other = ", ".join(f"{kind} {value:,.0f}" for kind, value in result.expected.items())
    return f"{text or 'nothing'}; the formula says {other or 'nothing'}"


def table(results: Sequence[CellResult]) -> Table:
    drawn = Table(title="largest relative difference from one process", title_justify="left")
    for column in COLUMNS:
        drawn.add_column(column)
    for result in results:
        drawn.add_row(*cells_of(result))
    return drawn


def sections_after(page: Path) -> str:
    """The sections of a page that follow the table, which others write; none where there is no page yet."""
    _, heading, rest = page.read_text().partition("\n## ") if page.exists() else ("", "", "")
    return heading + rest


def document(results: Sequence[CellResult], command: str) -> str:
    """docs/parity.md."""
    from sora_train.device.measuring import machine

    facts = machine()
    lines = [
        "# Every layout, the same numbers",
        "",
        f"Written by `{command}` on {datetime.now(UTC):%Y-%m-%d}: {facts['cpu']}, {facts['cores']} core(s), GPU "
        f"{facts['gpu']}, torch {facts['torch']}.",
        "",
        f"`experiment=parity_tiny` has images and videos and trains {STEPS} steps.",
        "Each layout is compared with one process that trains the same micro-batches: by plain SGD without",
        "clipping, and by AdamW with clipping. AdamW and clipping hide a wrong scale of the gradient, plain",
        "SGD does not. The table has the largest relative difference over all steps: |a - b| / |b| of a",
        "number, max|a - b| / max|b| of each tensor of the final weights. The gradient of a bias of keys is a",
        "sum that cancels, so it is measured by the bias of the queries if that is larger.",
        "Allowed: " + ", ".join(f"{value:g} in {name}" for name, value in TOLERANCE.items()) + ".",
        "FSDP2 is compared in float64, master weights too; ZeRO keeps float32 masters and is compared in",
        "float32. In bfloat16 layouts round other partial sums, which shows in small gradients first. In",
        "float64 the text encoder's norms are float64 too: those of transformers square in float32, so a",
        "difference in the 16th digit may become one in the 10th some steps later. The last row is one run",
        "that changes its layout every two steps, compared with a run that does not.",
        "",
        "Bytes are counted in the third step and equal the formula (`sora_train/parallel/checks/volume.py`)",
        "unless a cell says otherwise. They are those of a collective's whole tensor, added up over the",
        "ranks. The small exchanges of the control plane, the dealt-out work of frozen networks and the",
        "norm's one number are not counted.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cells_of(result)) + " |" for result in results),
        "",
    ]
    return "\n".join(lines)
