"""What an evaluation found: its clips with their numbers, means with intervals, and all of it as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

from sora_train.base.files import write_atomically
from sora_train.evaluation.cases import Sampled
from sora_train.evaluation.paired import student
from sora_train.evaluation.probes.every import PROBES
from sora_train.evaluation.registry import METRICS, Metric

CONFIDENCE = 0.95
FILE = "eval.json"


@dataclass
class Evaluation:
    """One run, or one folder, as it was judged."""

    name: str
    folder: Path
    """Where clips, numbers and page are."""
    facts: dict[str, Any]
    clips: list[Sampled]
    of_set: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was left out, and why, in sentences."""
    curves: list[dict[str, float]] = field(default_factory=list)
    """The rows of the run's metrics.jsonl."""


@dataclass(frozen=True)
class Mean:
    """A metric over the clips of a group."""

    group: str
    name: str
    value: float
    low: float
    high: float
    """Ends of the interval: Wilson's for shares of clips, else Student's; NaN for one clip, or one number of a set."""
    count: int

    @property
    def interval(self) -> str:
        return "" if math.isnan(self.low) else f"{self.low:.4g} to {self.high:.4g}"


def metric_of(name: str) -> Metric:
    known = METRICS | {key: one for probe in PROBES for key, one in probe.metrics.items()}
    return known[name]


def place_of(name: str) -> tuple[int, str]:
    """Orders metrics as they are listed; those of probes come last."""
    known = list(METRICS)
    return (known.index(name) if name in known else len(known), name)


def means(evaluation: Evaluation) -> list[Mean]:
    """Group by group, in the order in which metrics are listed."""
    found = []
    for group in dict.fromkeys(one.case.group for one in evaluation.clips):
        inside = [one.numbers for one in evaluation.clips if one.case.group == group]
        for name in dict.fromkeys(name for numbers in inside for name in numbers):
            values = [numbers[name] for numbers in inside if name in numbers]
            found.append(
                Mean(
                    group,
                    name,
                    fmean(values),
                    *interval(values, shares=metric_of(name).unit == "share"),
                    len(values),
                )
            )
    count = len(evaluation.clips)
    found += [
        Mean("all", name, value, math.nan, math.nan, count)
        for name, value in evaluation.of_set.items()
    ]
    return found


def interval(values: Sequence[float], *, shares: bool = False) -> tuple[float, float]:
    """Of the mean of these, which are 0 or 1 each with `shares`; NaN for a single one."""
    count, mean = len(values), fmean(values)
    if count < 2:
        return math.nan, math.nan
    if shares:
        # Wilson 1927: a share of 0 or 1 is not sure because no clip differs.
        z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
        middle = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
        half = math.sqrt(mean * (1 - mean) / count + z**2 / (4 * count**2)) * z / (1 + z**2 / count)
        return max(0.0, middle - half), min(1.0, middle + half)
    half = student(CONFIDENCE, count - 1) * stdev(values) / math.sqrt(count)
    return mean - half, mean + half


def write(evaluation: Evaluation) -> Path:
    """`eval.json` in the folder of the results; returns its path."""
    rows = [
        {
            "group": one.case.group,
            "prompt": one.case.prompt,
            "file": one.file,
            "metrics": {name: _finite(value) for name, value in one.numbers.items()},
        }
        for one in evaluation.clips
    ]
    summary = [
        {
            "group": mean.group,
            "metric": mean.name,
            "value": _finite(mean.value),
            "low": _finite(mean.low),
            "high": _finite(mean.high),
            "clips": mean.count,
            "tier": metric_of(mean.name).tier,
            "unit": metric_of(mean.name).unit,
            "better": metric_of(mean.name).better,
        }
        for mean in means(evaluation)
    ]
    about = {"name": evaluation.name, **evaluation.facts, "notes": evaluation.notes}
    evaluation.folder.mkdir(parents=True, exist_ok=True)
    path = evaluation.folder / FILE
    write_atomically(path, json.dumps(about | {"summary": summary, "clips": rows}, indent=1))
    return path


def number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
