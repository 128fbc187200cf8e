"""A call of a stage with a few rows: what a worker process does, and what becomes of its answer.

The same code serves every engine. A row whose file cannot be read, or whose call hangs, crashes or takes too much
memory, gets the reason as its result; storage that fails is an error of the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.ledger import Ledger
from data_prep.stage import DROPS, KEY, LATER, OF_ROW, Stage, Workspace, load_stage
from sora_train.data.sample import Failure
from sora_train.errors import Fault

WORKER = "data_prep.worker"


@dataclass(frozen=True)
class Call:
    """Asks a worker process for a stage's result of some rows; crosses to it as bytes."""

    key: str
    module: str
    settings: str
    out: str
    rows: bytes
    memory_gb: float
    row: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Answer:
    """What a worker says: the result's bytes, or (reason, detail) of what may be done later, or a fault of the run."""

    seconds: float
    """Of the process's cores, so that other work on the machine does not count."""
    table: bytes | None = None
    later: tuple[str, str] | None = None
    fault: str = ""


def call_of(stage: Stage, settings: Any, out: Path, rows: pa.Table, memory_gb: float) -> Call:
    names = ", ".join(rows[KEY].to_pylist())
    return Call(
        names, stage.module, settings.model_dump_json(), str(out), as_bytes(rows), memory_gb
    )


def answered(call: Call) -> bytes:
    """The stage's result, checked. Raises what the stage does, and Fault where it breaks its word."""
    stage, settings = _loaded(call.module, call.settings)
    rows = from_bytes(call.rows)
    return as_bytes(checked(stage, rows, stage.run(rows, settings, Workspace(Path(call.out)))))


@cache
def _loaded(module: str, settings: str) -> tuple[Stage, Any]:
    stage = load_stage(module)
    return stage, stage.config.model_validate(json.loads(settings), strict=False)


def checked(stage: Stage, rows: pa.Table, result: pa.Table) -> pa.Table:
    """A stage's result with all its columns in their types. Raises Fault where rows or columns are missing."""
    if OF_ROW not in result.schema.names and len(result) == len(rows):
        result = result.append_column(OF_ROW, pa.array(range(len(rows)), pa.int64()))
    missing = [name for name in stage.adds.names if name not in result.schema.names]
    if missing:
        raise Fault(
            f"the stage {stage.name} returns no column {missing[0]!r}, which its `adds` names"
        )
    for name in (*DROPS.names, *LATER.names):
        if name not in result.schema.names:
            result = result.append_column(name, pa.array([""] * len(result), pa.string()))
    # The parts of a source have one key, and its clips stand for all of them.
    keys = rows[KEY].to_pylist() if KEY in rows.schema.names else list(range(len(rows)))
    owners = result[OF_ROW].to_pylist() if OF_ROW in result.schema.names else []
    kept = {keys[number] for number in owners}
    if lost := [key for key in keys if key not in kept]:
        raise Fault(
            f"the stage {stage.name} returns {len(result)} rows for {len(rows)}, and none for {lost[0]}; "
            "a row that is of no use gets a drop_reason"
        )
    schema = pa.unify_schemas([stage.adds, DROPS, LATER, pa.schema([(OF_ROW, pa.int64())])])
    return result.select(schema.names).cast(schema)


def settled(
    ledger: Ledger, addresses: Sequence[str], answer: Answer | Failure
) -> dict[str, tuple[str, str]]:
    """Keep an answer in the ledger; what failed only for now is returned instead. Raises Fault for a worker's."""
    if isinstance(answer, Failure):
        if len(addresses) > 1:
            # Which of the rows is to blame is not known.
            return dict.fromkeys(addresses, (answer.reason, answer.detail))
        result = failed(ledger.stage, len(addresses), answer.reason, answer.detail)
        ledger.put(addresses, result, 0.0)
    elif answer.fault:
        raise Fault(f"the stage {ledger.stage.name} cannot go on: {answer.fault}")
    elif answer.later is not None:
        return dict.fromkeys(addresses, answer.later)
    else:
        assert answer.table is not None
        return _kept(ledger, addresses, from_bytes(answer.table), answer.seconds)
    return {}


def _kept(
    ledger: Ledger, addresses: Sequence[str], table: pa.Table, seconds: float
) -> dict[str, tuple[str, str]]:
    """Keep the rows of a table but those that a stage has put off, which are returned."""
    is_later = pc.not_equal(table["later_reason"], "")
    later = table.filter(is_later).select([OF_ROW, *LATER.names]).to_pylist()
    table = table.filter(pc.invert(is_later)).drop_columns(LATER.names)
    if len(table):
        ledger.put(addresses, table, seconds)
    return {addresses[row[OF_ROW]]: (row["later_reason"], row["later_detail"]) for row in later}


def failed(stage: Stage, rows: int, reason: str, detail: str) -> pa.Table:
    """The result of rows that could not be computed: the reason, and nothing else."""
    schema = pa.unify_schemas([stage.adds, DROPS, pa.schema([(OF_ROW, pa.int64())])])
    line = dict.fromkeys(schema.names) | {
        "drop_stage": "",
        "drop_reason": reason,
        "drop_detail": detail,
    }
    return pa.Table.from_pylist([line | {OF_ROW: number} for number in range(rows)], schema=schema)


def as_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def from_bytes(data: bytes) -> pa.Table:
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()
