"""A row for each run of a sweep: its values, its state, its metric. From the runs' folders alone."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sora_train.config.renamed import with_new_names
from sora_train.config.schema import flatten
from sora_train.config.yaml_files import load_yaml
from sora_train.errors import UserError
from sora_train.monitoring.metrics import read_metrics
from sora_train.monitoring.status import is_run, read_status
from sora_train.tools.sweep.folder import read_sweep

UNSWEPT = ("run.", "name", "launch.", "sweep.", "tracker.", "resume.", "init.", "dry_run")
"""Keys that differ between runs without being what is compared."""
NOISY = "train/"
"""Metrics of single steps; what is shown of them is the mean of a run's last tenth."""
MORE_IS_BETTER = ("psnr", "ssim", "accuracy", "per_second", "tflops", "mfu", "productive")
SEED = "seed"


@dataclass(frozen=True)
class Row:
    id: str
    values: dict[str, str]
    state: str
    why: str
    step: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list, repr=False)
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    """Dotted."""

    def curve(self, name: str) -> dict[int, float]:
        return {int(row["step"]): row[name] for row in self.metrics if name in row}

    def final(self, name: str) -> float:
        """The metric at the end of the run, NaN where it has none: see NOISY."""
        values = list(self.curve(name).values())
        if not values:
            return math.nan
        if name.startswith(NOISY):
            tail = values[-max(1, len(values) // 10) :]
            return sum(tail) / len(tail)
        return values[-1]

    def best(self, name: str, more: bool) -> float:
        values = [value for value in self.curve(name).values() if math.isfinite(value)]
        return (max if more else min)(values, default=math.nan)

    @property
    def seconds(self) -> float:
        """Seconds of all steps, waiting for data included."""
        return sum(row.get("train/step_seconds", 0.0) for row in self.metrics)

    @property
    def group(self) -> tuple[tuple[str, str], ...]:
        """Its values without the seed: runs of one group are repetitions."""
        return tuple((key, value) for key, value in self.values.items() if key != SEED)


@dataclass(frozen=True)
class SweepResults:
    folder: Path
    axes: dict[str, list[str]]
    rows: list[Row]
    """The best first; runs without the metric last."""
    metric: str
    more: bool
    """Whether more of it is better."""

    @property
    def criterion(self) -> str:
        mean = ", mean of the last tenth of the steps" if self.metric.startswith(NOISY) else ""
        return f"{self.metric}{mean}, {'more' if self.more else 'less'} is better"

    def groups(self) -> dict[tuple[tuple[str, str], ...], list[Row]]:
        """Runs that differ in their seed alone, those with the best mean first."""
        groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.group, []).append(row)
        return groups


def collect(folder: Path, metric: str = "") -> SweepResults:
    """The runs of a sweep, or of any folder of runs, with their metrics.

    Raises UserError where there is no run, or no run has the metric.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the run.dir of a sweep")
    sweep = read_sweep(folder)
    if sweep is not None:
        rows = [row_of(folder / run.id, run.id, dict(run.values)) for run in sweep.runs]
        axes = sweep.axes
    else:
        runs = [row_of(path, path.name, {}) for path in sorted(folder.iterdir()) if is_run(path)]
        axes, rows = with_axes(runs)
    if not rows:
        raise UserError(
            f"{folder} holds no sweep (no sweep.json) and no runs; give the run.dir of `sora train -m`, or a folder "
            "whose folders are runs"
        )
    search = (sweep.search if sweep is not None else None) or {}
    metric = metric or search.get("metric", "") or usual(rows)
    require(rows, metric)
    goal = search.get("goal") if metric == search.get("metric") else None
    more = goal == "maximize" if goal else metric.endswith(MORE_IS_BETTER)
    return SweepResults(folder, axes, ordered(rows, metric, more), metric, more)


def row_of(run_dir: Path, id: str, values: dict[str, str]) -> Row:
    if not is_run(run_dir):
        return Row(id, values, "not started", "")
    status = read_status(run_dir)
    path = run_dir / "metrics.jsonl"
    config = run_dir / "config.yaml"
    return Row(
        id,
        values,
        status.state,
        status.why,
        status.step,
        read_metrics(path) if path.exists() else [],
        flatten(with_new_names(load_yaml(config))) if config.exists() else {},
    )


def with_axes(rows: Sequence[Row]) -> tuple[dict[str, list[str]], list[Row]]:
    """The keys in which runs differ, with their values, and the runs with theirs."""
    names = dict.fromkeys(key for row in rows for key in row.config)
    axes = {}
    for key in names:
        values = dict.fromkeys(str(row.config.get(key)) for row in rows if row.config)
        if len(values) > 1 and not key.startswith(UNSWEPT):
            axes[key] = sorted(values, key=by_number)
    return axes, [
        Row(**{**vars(row), "values": {key: str(row.config.get(key)) for key in axes}})
        for row in rows
    ]


def usual(rows: Sequence[Row]) -> str:
    """The validation loss where there is one."""
    return "val/loss" if any("val/loss" in row for r in rows for row in r.metrics) else "train/loss"


def require(rows: Sequence[Row], metric: str) -> None:
    known = sorted({name for row in rows for line in row.metrics for name in line})
    if known and metric not in known:
        near = difflib.get_close_matches(metric, known, 1)
        raise UserError(
            f"no run has the metric {metric!r}; {f'did you mean {near[0]}? ' if near else ''}there are: "
            f"{', '.join(known)}"
        )


def ordered(rows: Sequence[Row], metric: str, more: bool) -> list[Row]:
    """The best group first, by the mean over its seeds, and in it the best run; those without the metric last."""

    def worth(value: float) -> float:
        return math.inf if math.isnan(value) else (-value if more else value)

    means = {}
    for row in rows:
        finals = [r.final(metric) for r in rows if r.group == row.group]
        known = [value for value in finals if math.isfinite(value)]
        means[row.group] = worth(sum(known) / len(known) if known else math.nan)
    return sorted(rows, key=lambda row: (means[row.group], worth(row.final(metric))))


def by_number(text: str) -> tuple[float, str]:
    """Numbers by size, and before words."""
    number = as_number(text)
    return (math.inf if number is None else number, text)


def as_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
