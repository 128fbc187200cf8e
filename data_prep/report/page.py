"""The page itself: what `report.html` shows of a table of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.captioning.spending import Usage
from data_prep.report.account import Account, Row, Share, account, at_random, counted, rows_of
from data_prep.report.score_charts import ScoreChart, score_chart, thresholds
from data_prep.report.sheets import Pictures, Shown, at_threshold, duplicates, said, with_files
from data_prep.report.training import Training
from data_prep.report.work import Work
from data_prep.thresholds import Moved
from sora_train.data.captions.texts import MAIN, as_prompt, named_captions
from sora_train.monitoring.report.page import hours, render

CAPTION_FRAMES, CAPTION_SHOWN = 4, 600
SOURCES_LISTED, THRESHOLDS_SHOWN = 20, 8
# Pictures in all, at about 6 kB each.
MOST_PICTURES = 600
NEEDED = [
    *("key", "source", "kind", "licence", "drop_stage", "drop_reason", "drop_detail"),
    *("begin", "end", "part_begin", "part_end", "source_duration"),
    *("file", "bytes", "digest", "frames", "fps", "width", "height", "duration", "start", "traits"),
    *("camera", "crop_reason", "duplicate_of", "duplicate_distance", "caption", "captions"),
    *("caption_source", "caption_version", "caption_tokens", "caption_cost", "caption_contradicts"),
]
COUNTED = {"camera": "Camera movement", "crop_reason": "Cropped for", "kind": "Kind"}


def page(
    table: pa.Table,
    pictures: Pictures,
    *,
    stages: Sequence[str],
    filter_stage: str,
    keep: str,
    scores: Sequence[str],
    work: Sequence[Work],
    spent: Usage,
    training: Training,
    experiment: str,
    title: str,
    count: int,
) -> str:
    """The HTML. `keep` is the text of the filters, `scores` are columns of numbers, `count` clips go into a sheet."""
    came = _came_to(table, stages, filter_stage)
    moves = thresholds(keep, came)
    scores = list(dict.fromkeys([*scores, *(move.column for move in moves)]))
    scores = [name for name in scores if name in table.schema.names]
    rows = rows_of(table, [*NEEDED, *scores])
    for row in rows:
        row["drop_reason"] = row["drop_reason"] or ""
    kept = [row for row in rows if not row["drop_reason"]]
    dropped = [row for row in rows if row["drop_reason"]]
    told = account(rows, stages)
    charts, alike = _charts(came, scores, moves)
    return render(
        "report/page.html",
        package="data_prep",
        title=title,
        account=told,
        tiles=_tiles(told, training, spent),
        charts=charts,
        alike=alike,
        has_filters=bool(moves),
        counts=_counts(kept),
        sheets=_sheets(kept, dropped, scores, pictures, count),
        thresholds=_thresholds(rows, moves, scores, pictures) if count else [],
        pairs=_pairs(rows, pictures, count),
        duplicates=sum(bool(row["duplicate_of"]) for row in rows),
        captions=_captions(kept, pictures, count),
        caption_counts=_caption_counts(rows, kept),
        spent=spent,
        training=training,
        experiment=experiment,
        work=work,
        licences=counted(kept, "licence"),
        sources=_sources(rows),
        sources_listed=SOURCES_LISTED,
    )


def _came_to(table: pa.Table, stages: Sequence[str], stage: str) -> pa.Table:
    """The rows that came to a stage, whatever it did with them."""
    before = set(stages[: list(stages).index(stage)]) if stage in stages else set()
    came = [name not in before for name in table["drop_stage"].to_pylist()]
    return table.filter(pa.array(came, pa.bool_()))


def _tiles(told: Account, training: Training, spent: Usage) -> dict[str, str]:
    tokens = sum(bucket.clips * bucket.tokens for bucket in training.buckets)
    return {
        "sources": f"{told.sources.rows:,}",
        "of footage": hours(told.sources.hours),
        "clips cut": f"{told.clips.rows:,}",
        "clips kept": f"{told.kept.rows:,}",
        "of video kept": hours(told.kept.hours),
        "rows dropped": f"{told.dropped.rows:,}",
        "tokens an epoch": f"{tokens:,}" if tokens else "",
        "spent on captions": f"{spent.cost:,.4g}" if spent.cost else "",
    }


def _charts(
    rows: pa.Table, scores: Sequence[str], moves: Sequence[Moved]
) -> tuple[list[ScoreChart], list[str]]:
    """The charts, and `name value` of scores that are the same for all clips and that no filter looks at."""
    is_kept = np.array([not reason for reason in rows["drop_reason"].to_pylist()], bool)
    charts, alike = [], []
    for name in scores:
        values = np.array([np.nan if v is None else v for v in rows[name].to_pylist()], np.float64)
        known = np.unique(values[np.isfinite(values)])
        if len(known) == 1 and name not in {move.column for move in moves}:
            alike.append(f"{name} {known[0]:.4g}")
        elif len(known):
            charts.append(score_chart(name, values, is_kept, moves))
    return charts, alike


def _counts(kept: Sequence[Row]) -> list[tuple[str, list[tuple[str, int, float]]]]:
    tables = [(name, counted(kept, column, "no value")) for column, name in COUNTED.items()]
    return [
        (name, table)
        for name, table in tables
        if len(table) > 1 or table and table[0][0] != "no value"
    ]


def _sheets(
    kept: Sequence[Row],
    dropped: Sequence[Row],
    scores: Sequence[str],
    pictures: Pictures,
    count: int,
) -> list[tuple[str, list[Shown]]]:
    """Kept and dropped clips at random; dropped ones that never became a file have no picture and are left out."""
    sheets = []
    for name, rows in (("Kept", kept), ("Dropped", dropped)):
        shown = at_random(with_files(rows), count)
        columns = ("camera", "motion") if "motion" in scores else ("camera",)
        if shown:
            sheets.append((f"{name}, at random", pictures.shown(shown, "duration", *columns)))
    return sheets


def _thresholds(
    rows: Sequence[Row], moves: Sequence[Moved], scores: Sequence[str], pictures: Pictures
) -> list[tuple[Moved, list[Shown], list[Shown]]]:
    found = []
    for move in moves[:THRESHOLDS_SHOWN]:
        if move.column in scores:
            passing, failing = at_threshold(rows, move)
            if passing or failing:
                kept, lost = (pictures.shown(side, move.column) for side in (passing, failing))
                found.append((move, kept, lost))
    return found


def _pairs(rows: Sequence[Row], pictures: Pictures, count: int) -> list[tuple[Shown, Shown, str]]:
    pairs = []
    for original, copy in duplicates(rows, count):
        shown = pictures.shown([original, copy], "width", "height", "duration")
        distance = copy["duplicate_distance"]
        pairs.append((shown[0], shown[1], "" if distance is None else said(distance)))
    return pairs


def _captions(kept: Sequence[Row], pictures: Pictures, count: int) -> list[dict[str, Any]]:
    """Clips with their captions, those that contradict the measured camera first."""
    captioned = [row for row in kept if row["caption"]]
    against = at_random([row for row in captioned if row["caption_contradicts"]], count // 3)
    others = at_random([row for row in captioned if not row["caption_contradicts"]], count // 2)
    shown = [*against, *others]
    return [
        {
            "key": row["key"],
            "pictures": taken,
            "texts": [
                (name, text[:CAPTION_SHOWN] + ("\u2026" if len(text) > CAPTION_SHOWN else ""))
                for name, text in _texts(row)
            ],
            "camera": row["camera"] or "",
            "contradicts": row["caption_contradicts"] or "",
        }
        for row, taken in zip(shown, pictures.of(shown, CAPTION_FRAMES), strict=True)
    ]


def _texts(row: Row) -> list[tuple[str, str]]:
    main = row["caption"]
    named = {name: as_prompt(text) for name, text in named_captions(row["captions"] or "").items()}
    return [(MAIN, main), *((name, text) for name, text in named.items() if text != main)]


def _caption_counts(rows: Sequence[Row], kept: Sequence[Row]) -> dict[str, Any]:
    reasons = [row["drop_reason"] for row in rows if row["drop_stage"] == "caption"]
    return {
        "sources": [(v, n) for v, n, _ in counted(kept, "caption_source", "no caption")],
        "versions": [(v, n) for v, n, _ in counted(kept, "caption_version", "no version")],
        "tokens": sum(row["caption_tokens"] or 0 for row in kept),
        "cost": sum(row["caption_cost"] or 0.0 for row in kept),
        "contradicting": sum(bool(row["caption_contradicts"]) for row in kept),
        "failed": reasons.count("caption_failed"),
        "unpaid": reasons.count("caption_budget"),
    }


def _sources(rows: Sequence[Row]) -> list[tuple[str, int, float, int]]:
    """(source, kept clips, hours, dropped rows), those with the most kept hours first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["source"] or row["key"], []).append(row)
    found = []
    for name, members in groups.items():
        kept = [row for row in members if not row["drop_reason"]]
        found.append((name, len(kept), Share.of(kept).hours, len(members) - len(kept)))
    return sorted(found, key=lambda one: (-one[2], -one[1], one[0]))
