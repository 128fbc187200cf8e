"""Which clips are shown with their pictures, and the pictures as data URLs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.media.pictures import pictures
from data_prep.report.account import at_random
from data_prep.stage import Workspace
from data_prep.thresholds import Moved
from sora_train.data.decode.frames import BadClip
from sora_train.data.storage.ranges import StorageFault

SIDE, QUALITY = 176, 70
BESIDE_THRESHOLD = 4
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """A clip on the page: data URLs of its frames (none where it has no file), and what is said below them."""

    key: str
    pictures: list[str]
    lines: list[str]
    is_kept: bool = True


@dataclass
class Pictures:
    """Takes frames of clip files, each once, up to `most` in all."""

    workspace: Workspace
    most: int
    _taken: dict[tuple[str, int], list[str]] = field(default_factory=dict)

    def of(self, row: Row, count: int = 1) -> list[str]:
        """Data URLs of frames; none of a row without a file, of one that cannot be read, and beyond `most`."""
        if not (row.get("file") and row["bytes"] and row["width"] and row["height"]):
            return []
        place = row["file"], count
        if place not in self._taken:
            if sum(map(len, self._taken.values())) + count > self.most:
                return []
            try:
                found = pictures(row, self.workspace, count, SIDE)
            except (BadClip, StorageFault, OSError):
                found = []
            self._taken[place] = [_data_url(one) for one in found]
        return self._taken[place]

    def shown(self, rows: Iterable[Row], *columns: str) -> list[Shown]:
        """Clips with one picture, and the values of some columns that they have."""
        return [
            Shown(row["key"], self.of(row), _lines(row, columns), not row["drop_reason"])
            for row in rows
        ]


def _data_url(picture: Any) -> str:
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _lines(row: Row, columns: Sequence[str]) -> list[str]:
    lines = [f"{name} {said(row[name])}" for name in columns if row.get(name) not in (None, "")]
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
