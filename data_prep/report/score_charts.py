"""Histograms of scores, kept beside dropped, with the thresholds of the filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from data_prep.expressions import conditions
from data_prep.thresholds import Moved, moved
from sora_train.monitoring.report.charts import (
    BLUE,
    ORANGE,
    Frame,
    short,
    tag,
    ticks,
    widened,
)
from sora_train.monitoring.report.page import hours

KEEP = "filter.keep"
BINS = 30
GREY = "#c9c9c4"
# Shares of the values between which the axis lies: a few odd ones must not press the others together.
INNER = (0.005, 0.995)


@dataclass(frozen=True)
class ScoreChart:
    name: str
    svg: Markup
    values: int
    """Clips that have a value."""
    notes: list[str]


def thresholds(keep: str, rows: pa.Table) -> list[Moved]:
    """The filters with a threshold, as far as their columns are there; `rows`: those that came to the filters."""
    names = set(rows.schema.names)
    present = [one.text for one in conditions(keep, KEEP) if set(one.columns) <= names]
    return moved(" and ".join(f"({text})" for text in present), rows, KEEP) if present else []


def score_chart(
    name: str, values: np.ndarray, is_kept: np.ndarray, moves: Sequence[Moved]
) -> ScoreChart:
    """`values` float (N,), NaN where there is none; one or more are known."""
    known = np.isfinite(values)
    own = [move for move in moves if move.column == name]
    values, is_kept = values[known], is_kept[known]
    low, high = np.quantile(values, INNER)
    marks = [move.threshold for move in own]
    limits = widened(float(min([low, *marks])), float(max([high, *marks])))
    inside = np.clip(values, *limits)
    edges = np.linspace(*limits, BINS + 1)
    all_counts, kept_counts = (np.histogram(one, edges)[0] for one in (inside, inside[is_kept]))
    frame = Frame(limits, (0.0, float(all_counts.max())))
    frame.grid(short, whole=True)
    for number in np.flatnonzero(all_counts):
        _bar(frame, edges[number : number + 2], int(all_counts[number]), int(kept_counts[number]))
    frame.axis("", [(value, short(value)) for value in ticks(*limits)])
    for move in own:
        hint = tag("title", move.text)
        frame.upright(move.threshold, ORANGE, hint, stroke_width=2, stroke_dasharray="5 3")
    return ScoreChart(name, frame.svg(), int(known.sum()), [_told(move) for move in own])


def _bar(frame: Frame, edges: np.ndarray, count: int, kept: int) -> None:
    """Kept clips from below, the dropped ones on top of them."""
    begin, end = frame.x(edges[0]) + 0.5, frame.x(edges[1]) - 0.5
    hint = f"{short(edges[0])} to {short(edges[1])}: {kept} kept, {count - kept} dropped"
    for top, bottom, colour in ((count, kept, GREY), (kept, 0, BLUE)):
        if top > bottom:
            # A single clip among millions is still seen.
            height = max(frame.y(bottom) - frame.y(top), 1.5)
            frame.draw(
                "rect",
                tag("title", hint),
                x=begin,
                y=frame.y(bottom) - height,
                width=end - begin,
                height=height,
                fill=colour,
            )


def _told(move: Moved) -> str:
    return (
        f"{move.text}: at {move.looser:.4g} it would keep {move.won:,} more ({hours(move.won_hours)}), at "
        f"{move.tighter:.4g} {move.lost:,} fewer ({hours(move.lost_hours)})"
    )
