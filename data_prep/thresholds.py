"""What moving a filter's threshold would do: for the report, which draws the thresholds into the scores' histograms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.expressions import Condition, conditions

STEP = 0.1
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Moved:
    """A filter that compares a column with a number, and what is kept where the number moves by a tenth."""

    text: str
    """The filter as written, which is the `drop_reason` of what it drops."""
    column: str
    sign: str
    """One of < <= > >=, between the column and the threshold."""
    threshold: float
    looser: float
    """The threshold a tenth away that keeps more; `tighter`: less."""
    tighter: float
    won: int
    """Clips that `looser` would keep beside those kept now, the other filters as they are."""
    won_hours: float
    lost: int
    """Clips kept now that `tighter` would drop."""
    lost_hours: float


def moved(keep: str, rows: pa.Table, key: str = "filter.keep") -> list[Moved]:
    """Each filter of `keep` that compares a column with a number, in the order of the text.

    `rows`: those that came to the filters, kept or not; their column `duration` (seconds) gives the hours. A tenth is
    one of the threshold, and of the values' range where that is 0.
    """
    wanted = conditions(keep, key)
    passing = [_passes(condition.holds(rows)) for condition in wanted]
    seconds = _seconds(rows)
    found = []
    for number, condition in enumerate(wanted):
        if condition.threshold is None:
            continue
        column, sign, threshold = condition.threshold
        by = STEP * (abs(threshold) or _range(rows[column])) * (1 if sign in ("<", "<=") else -1)
        others = _all(passing[:number] + passing[number + 1 :], len(rows))
        won = others & ~passing[number] & _passing(condition, threshold + by, rows)
        lost = others & passing[number] & ~_passing(condition, threshold - by, rows)
        found.append(
            Moved(
                condition.text,
                column,
                sign,
                threshold,
                threshold + by,
                threshold - by,
                int(won.sum()),
                float(seconds[won].sum()) / SECONDS_PER_HOUR,
                int(lost.sum()),
                float(seconds[lost].sum()) / SECONDS_PER_HOUR,
            )
        )
    return found


def _passing(condition: Condition, threshold: float, rows: pa.Table) -> np.ndarray:
    assert condition.threshold is not None
    column, sign, _ = condition.threshold
    (other,) = conditions(f"{column} {sign} {threshold!r}", condition.key)
    return _passes(other.holds(rows))


def _passes(holds: pa.ChunkedArray) -> np.ndarray:
    """bool (rows,): what is unknown passes."""
    return np.array(pc.fill_null(holds, True).to_pylist(), bool)


def _all(passing: Sequence[np.ndarray], rows: int) -> np.ndarray:
    return np.logical_and.reduce([np.ones(rows, bool), *passing])


def _seconds(rows: pa.Table) -> np.ndarray:
    if "duration" not in rows.schema.names:
        return np.zeros(len(rows))
    return np.array([value or 0.0 for value in rows["duration"].to_pylist()])


def _range(column: pa.ChunkedArray) -> float:
    ends = pc.min_max(column.cast(pa.float64(), safe=False)).as_py()
    return (ends["max"] or 0.0) - (ends["min"] or 0.0)
