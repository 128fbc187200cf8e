"""Every row counted once: what came in, what each stage dropped for which reason, what is left, in rows and hours."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

CUT = "cut"
EXAMPLES = 3
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Share:
    """Some rows and the hours they show."""

    rows: int
    hours: float

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Share:
        seconds = [seconds_of(row) for row in rows]
        return cls(len(seconds), sum(seconds) / 3600)


@dataclass(frozen=True)
class Step:
    """A stage of the funnel: what it dropped, and what is left after it."""

    stage: str
    dropped: Share
    left: Share


@dataclass(frozen=True)
class Reason:
    stage: str
    reason: str
    share: Share
    examples: list[tuple[str, str]]
    """(key, detail) of some."""


@dataclass(frozen=True)
class Account:
    """`steps` count sources up to `cut`, clips from there on; `clips` are the rows that it made."""

    sources: Share
    clips: Share
    kept: Share
    dropped: Share
    steps: list[Step]
    reasons: list[Reason]


def rows_of(table: pa.Table, names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows as dictionaries of these columns; a column that no stage gave is null."""
    there = [name for name in names if name in table.schema.names]
    missing = dict.fromkeys(names)
    return [missing | row for row in table.select(there).to_pylist()] if there else []


def seconds_of(row: Row) -> float:
    """How long a row shows something: a clip's file, its range of the source, or the part of the source."""
    for begin, end in (("", "duration"), ("begin", "end"), ("part_begin", "part_end")):
        if row.get(end) is not None and (not begin or row.get(begin) is not None):
            return max(0.0, row[end] - (row[begin] if begin else 0.0))
    return max(0.0, row.get("source_duration") or 0.0)


def account(rows: Sequence[Row], stages: Sequence[str]) -> Account:
    """The account of a table's rows; `stages` in their order. A row with another drop_stage counts for the last."""
    place = {name: number for number, name in enumerate(stages)}
    last = len(stages) - 1
    fell = [place.get(row["drop_stage"], last) if row["drop_reason"] else last + 1 for row in rows]
    cut = place.get(CUT, 0)
    by_stage: dict[int, list[Row]] = defaultdict(list)
    for number, row in zip(fell, rows, strict=True):
        by_stage[number].append(row)
    clips = [row for number, row in zip(fell, rows, strict=True) if number > cut]
    sources = {row["source"] or row["key"]: row for row in rows}
    steps = []
    for number, stage in enumerate(stages):
        left = [row for at, row in zip(fell, rows, strict=True) if at > number]
        if number < cut:
            # Its clips stand for a source that is left.
            left = list({row["source"] or row["key"]: row for row in left}.values())
        steps.append(
            Step(stage, _share(by_stage[number], number < cut), _share(left, number < cut))
        )
    return Account(
        sources=_share(sources.values(), of_sources=True),
        clips=Share.of(clips),
        kept=Share.of(by_stage[last + 1]),
        dropped=Share.of(row for row in rows if row["drop_reason"]),
        steps=steps,
        reasons=_reasons(rows, place),
    )


def _share(rows: Iterable[Row], of_sources: bool) -> Share:
    if not of_sources:
        return Share.of(rows)
    seconds = [max(0.0, row.get("source_duration") or 0.0) for row in rows]
    return Share(len(seconds), sum(seconds) / 3600)


def _reasons(rows: Sequence[Row], place: Mapping[str, int]) -> list[Reason]:
    """By stage, and within one by how many it dropped."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["drop_reason"]:
            groups[row["drop_stage"], row["drop_reason"]].append(row)
    order = sorted(groups.items(), key=lambda one: (place.get(one[0][0], 99), -len(one[1]), one[0]))
    return [
        Reason(
            stage,
            reason,
            Share.of(members),
            [(row["key"], row["drop_detail"] or "") for row in at_random(members, EXAMPLES)],
        )
        for (stage, reason), members in order
    ]


def at_random(rows: Sequence[Any], count: int) -> list[Any]:
    """Some rows, the same for the same keys in whatever order: those whose keys have the least digests."""
    return sorted(rows, key=lambda row: hashlib.sha256(str(row["key"]).encode()).digest())[:count]


def counted(
    rows: Iterable[Row], name: str, empty: str = "none given"
) -> list[tuple[str, int, float]]:
    """(value, rows, hours) of a column, the most frequent first."""
    rows = list(rows)
    hours: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for row in rows:
        value = str(row[name]) if row[name] not in (None, "") else empty
        numbers[value] += 1
        hours[value] += seconds_of(row) / 3600  # type: ignore[assignment]
    return [
        (value, number, hours[value])
        for value, number in sorted(numbers.items(), key=lambda one: (-one[1], one[0]))
    ]
