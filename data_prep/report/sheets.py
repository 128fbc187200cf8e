"""Which clips are shown with their pictures, and the pictures as data URLs."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from data_prep.media.pictures import jpeg, request_of
from data_prep.report.account import at_random
from data_prep.stage import Workspace
from data_prep.thresholds import Moved
from sora_train.data.decode.pool import DecodePool
from sora_train.data.sample import Failure
from sora_train.errors import Fault

SIDE, QUALITY = 176, 70
BESIDE_THRESHOLD = 4
UNITS = {"duration": " s"}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """A clip on the page: data URLs of its frames (none where it has no file), and what is said below them."""

    key: str
    pictures: list[str]
    lines: list[str]
    is_kept: bool = True


class Pictures:
    """Takes frames of clip files in processes of its own, each once, up to `most` in all."""

    def __init__(self, workspace: Workspace, pool: DecodePool, most: int):
        self._workspace, self._pool, self._left = workspace, pool, most
        self._taken: dict[tuple[str, int], Future] = {}

    def of(self, rows: Sequence[Row], count: int = 1) -> list[list[str]]:
        """Data URLs of frames; none of a row without a file, of one that cannot be read, and beyond `most`."""
        futures = [self._begun(row, count) for row in rows]
        return [_data_urls(future) if future else [] for future in futures]

    def shown(self, rows: Sequence[Row], *columns: str) -> list[Shown]:
        """Clips with one picture, and the values of some columns that they have."""
        return [
            Shown(row["key"], pictures, _lines(row, columns), not row["drop_reason"])
            for row, pictures in zip(rows, self.of(rows), strict=True)
        ]

    def _begun(self, row: Row, count: int) -> Future | None:
        if not all(row.get(name) for name in ("file", "bytes", "width", "height")):
            return None
        place = row["file"], count
        if place not in self._taken:
            if self._left < count:
                return None
            self._left -= count
            self._taken[place] = self._pool.submit(request_of(row, self._workspace, count, SIDE))
        return self._taken[place]


def _data_urls(future: Future) -> list[str]:
    try:
        frames = future.result()
    except Fault:
        # The file is gone; the page can do without.
        return []
    if isinstance(frames, Failure):
        return []
    coded = [base64.b64encode(jpeg(frame, QUALITY)).decode() for frame in frames]
    return [f"data:image/jpeg;base64,{one}" for one in coded]


def _lines(row: Row, columns: Sequence[str]) -> list[str]:
    known = [name for name in columns if row.get(name) not in (None, "")]
    lines = [f"{name} {said(row[name])}{UNITS.get(name, '')}" for name in known]
    if row["drop_reason"]:
        detail = row["drop_detail"] or ""
        lines.append(
            f"{row['drop_stage']}: {row['drop_reason']}" + (f" ({detail})" if detail else "")
        )
    return lines


def said(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def with_files(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.get("file")]


def at_threshold(rows: Sequence[Row], move: Moved) -> tuple[list[Row], list[Row]]:
    """The clips whose values lie nearest to a threshold, on the side that it keeps and on the other, outwards."""
    known = [
        row
        for row in with_files(rows)
        if row.get(move.column) is not None and math.isfinite(row[move.column])
    ]
    is_below = move.sign in ("<", "<=")

    def holds(row: Row) -> bool:
        value = row[move.column]
        if value == move.threshold:
            return move.sign in ("<=", ">=")
        return (value < move.threshold) == is_below

    def distance(row: Row) -> float:
        return abs(row[move.column] - move.threshold)

    nearest = sorted(at_random(known, len(known)), key=distance)
    sides = [
        [row for row in nearest if holds(row) == side][:BESIDE_THRESHOLD] for side in (True, False)
    ]
    return sides[0], sides[1]


def duplicates(rows: Sequence[Row], count: int) -> list[tuple[Row, Row]]:
    """(kept, dropped) pairs of clips, some at random."""
    by_key = {row["key"]: row for row in rows}
    found = [row for row in rows if row.get("duplicate_of") and row["duplicate_of"] in by_key]
    return [(by_key[row["duplicate_of"]], row) for row in at_random(found, count)]
