"""The page of an evaluation: numbers with their definitions, curves over steps, and the clips behind each number."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora_train.base.contact_sheet import filmstrip
from sora_train.base.files import write_atomically
from sora_train.evaluation.cases import Sampled
from sora_train.evaluation.registry import TIERS, Metric, worth
from sora_train.monitoring.report.page import render
from sora_train.monitoring.report.run_charts import curve_charts
from sora_train.tools.eval.compare import Compared
from sora_train.tools.eval.results import (
    CONFIDENCE,
    Evaluation,
    Mean,
    means,
    metric_of,
    number,
    place_of,
)

FILE = "eval.html"
FRAMES = 7
CURVES = "val/"
Table = tuple[list[str], list[list[str]]]


def means_table(evaluation: Evaluation, *, intervals: bool) -> Table:
    """A row a metric, a column a group of clips."""
    found = means(evaluation)
    groups = dict.fromkeys(mean.group for mean in found)
    counts = {group: max(mean.count for mean in found if mean.group == group) for group in groups}
    names = sorted({mean.name for mean in found}, key=place_of)
    cells = {
        (mean.name, mean.group): number(mean.value)
        + (f" ({mean.interval})" if intervals and mean.interval else "")
        for mean in found
    }
    rows = []
    for name in names:
        metric = metric_of(name)
        values = [cells.get((name, group), "") for group in groups]
        rows.append([name, *values, metric.unit, metric.better, metric.tier])
    heads = [f"{group} ({counts[group]})" for group in groups]
    return ["metric", *heads, "unit", "better", "tier"], rows


def compared_table(found: Sequence[Compared]) -> Table:
    heads = ["clips of", "metric", "first", "second", "difference", f"{CONFIDENCE:.0%} interval"]
    rows = []
    for one in found:
        gap = one.difference
        interval = "" if math.isnan(gap.low) else f"{gap.low:+.4g} to {gap.high:+.4g}"
        numbers = [number(one.first), number(one.second), f"{gap.mean:+.4g}", interval]
        rows.append([one.group, one.name, *numbers, gap.over, one.verdict])
    return [*heads, "over", "better"], rows


def write_page(evaluation: Evaluation) -> Path:
    """`eval.html` beside the numbers; returns its path."""
    path = evaluation.folder / FILE
    skipped = ("run", "val", "clips_of")
    tiles = {name: str(fact) for name, fact in evaluation.facts.items() if name not in skipped}
    page = render(
        "tools/eval/eval.html",
        title=f"Evaluation of {evaluation.name}",
        tiles={name.replace("_", " "): fact for name, fact in tiles.items()},
        table=means_table(evaluation, intervals=True),
        confidence=f"{CONFIDENCE:.0%}",
        tiers=TIERS,
        notes=evaluation.notes,
        charts=curve_charts(evaluation.curves, CURVES),
        metrics=[_shown(mean, evaluation) for mean in _told(means(evaluation))],
    )
    write_atomically(path, page)
    return path


def write_comparison(
    found: Sequence[Compared], first: Evaluation, second: Evaluation, path: Path
) -> None:
    page = render(
        "tools/eval/comparison.html",
        title=f"{second.name} against {first.name}",
        table=compared_table(found),
        pages=[
            (one.name, os.path.relpath(one.folder / FILE, path.parent)) for one in (first, second)
        ],
        confidence=f"{CONFIDENCE:.0%}",
    )
    write_atomically(path, page)


def _told(found: Sequence[Mean]) -> list[Mean]:
    """Each metric once, of the first group that has it: of the others the table tells."""
    first: dict[str, Mean] = {}
    for mean in found:
        first.setdefault(mean.name, mean)
    return [first[name] for name in sorted(first, key=place_of)]


def _shown(mean: Mean, evaluation: Evaluation) -> dict[str, Any]:
    """A metric of a group with the clips that are worst, in the middle and best."""
    metric = metric_of(mean.name)
    clips = [
        one for one in evaluation.clips if one.case.group == mean.group and mean.name in one.numbers
    ]
    clips.sort(key=lambda one: worth(one.numbers[mean.name], metric.better))
    return {
        "group": mean.group,
        "name": mean.name,
        "metric": metric,
        "value": number(mean.value),
        "interval": mean.interval,
        "strips": [
            (
                word,
                number(one.numbers[mean.name]),
                one.case.prompt,
                _where(one, evaluation),
                _picture(one),
            )
            for word, one in _picked(clips, metric)
        ],
    }


def _picked(clips: Sequence[Sampled], metric: Metric) -> list[tuple[str, Sampled]]:
    words = ("worst", "median", "best") if metric.better else ("lowest", "median", "highest")
    places = dict.fromkeys((0, len(clips) // 2, len(clips) - 1)) if clips else {}
    named = words if len(places) == 3 else (words[0], words[2]) if len(places) == 2 else ("only",)
    return [(word, clips[place]) for word, place in zip(named, places, strict=False)]


def _where(one: Sampled, evaluation: Evaluation) -> str:
    """The clip's file as the page links to it."""
    above = evaluation.facts.get("clips_of")
    return os.path.relpath(Path(above) / one.file, evaluation.folder) if above else one.file


def _picture(one: Sampled) -> str:
    """A filmstrip as base64 of JPEG."""
    data = io.BytesIO()
    filmstrip(one.clip, FRAMES).save(data, format="JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode()
