"""Drops the clips that a condition over their scores does not keep, each with the part of it that failed."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import field_validator

from data_prep.expressions import Condition, conditions, values_of
from data_prep.stage import Stage, Workspace
from sora_train.config.sections.base import Section
from sora_train.errors import ConfigError

KEEP = "filter.keep"
DEFAULT = "black < 0.5 and frozen < 0.5"


class FilterConfig(Section):
    """`filter:`"""

    keep: str = DEFAULT
    """The condition under which a clip is kept, over any columns, for example
    `text_area < 0.05 and motion > 0.02 and camera not in ('shake', 'roll')`; each part that `and` joins is a filter of
    its own, and a score that a clip does not have drops none. Empty: all are kept."""

    @field_validator("keep")
    @classmethod
    def _a_condition(cls, keep: str) -> str:
        conditions(keep, KEEP)
        return keep


def filter(rows: pa.Table, settings: FilterConfig, workspace: Workspace) -> pa.Table:
    """`drop_reason` is the first condition that a clip fails, `drop_detail` the clip's values in it.

    Raises ConfigError for a column that is not there, or that no clip has a value in.
    """
    wanted = conditions(settings.keep, KEEP)
    living = pc.equal(rows["drop_reason"], "")
    if settings.keep != DEFAULT:
        for condition in wanted:
            _check_is_scored(condition, rows.filter(living))
    reasons, details = [""] * len(rows), [""] * len(rows)
    failed = [pc.equal(condition.holds(rows), False).to_pylist() for condition in wanted]
    for number, is_living in enumerate(living.to_pylist()):
        first = next((n for n, fails in enumerate(failed) if fails[number]), None)
        if is_living and first is not None:
            columns = wanted[first].columns
            row = {name: rows[name][number].as_py() for name in columns}
            reasons[number] = wanted[first].text
            details[number] = values_of(row, columns)
    return pa.table({"drop_reason": reasons, "drop_detail": details})


def _columns(settings: FilterConfig) -> tuple[str, ...]:
    """The columns that the condition names, which a stage before must give."""
    wanted = conditions(settings.keep, KEEP)
    return tuple(dict.fromkeys(name for condition in wanted for name in condition.columns))


def _check_is_scored(condition: Condition, rows: pa.Table) -> None:
    """Raises ConfigError where no video has a value in a column; images have none in many."""
    if "kind" in rows.schema.names:
        rows = rows.filter(pc.equal(rows["kind"], "video"))
    for name in condition.columns:
        if len(rows) and name in rows.schema.names and rows[name].null_count == len(rows):
            raise ConfigError(
                f"{KEEP}={condition.whole}: {name!r} is null for all {len(rows)} videos, so {condition.text!r} would "
                f"drop none; its scorer is off or lacks its model: switch it on in the section score, or take "
                f"{condition.text!r} out"
            )


STAGE = Stage(
    name="filter",
    run=filter,
    config=FilterConfig,
    adds=pa.schema([]),
    whole=True,
    is_filter=True,
    reads_also=_columns,
)
