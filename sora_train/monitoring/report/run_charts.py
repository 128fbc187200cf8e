"""The charts of a run, from the rows of its metrics.jsonl: how it learned and how it ran."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from sora_train.monitoring.events import Event
from sora_train.monitoring.report.charts import (
    BLUE,
    FAINT,
    LEVELS,
    ORANGE,
    PALE_BLUE,
    Form,
    Line,
    Series,
    area_chart,
    line_chart,
    padded,
    percent,
    plain,
    short,
    smooth,
    thin,
)

Row = dict[str, float]
Titled = tuple[str, str]
"""A title and an SVG element; an empty element where the metrics are missing."""
TIME_PARTS = {
    "productive": BLUE,
    "data_wait": ORANGE,
    "checkpoint": "#2a788e",
    "evaluation": "#7ad151",
    "wasted": "#cf222e",
    "other": "#c9c9c4",
}
"""The parts of the wall clock and their colours, drawn from below."""
MAX_LINES = 8
# One early spike must not flatten the rest of a curve.
MOST = 0.995
"""The quantile of the values that is still inside of a chart."""


def training_charts(rows: list[Row], notes: Mapping[float, str] | None = None) -> list[Titled]:
    """(title, SVG element) of each chart of what was learned that has data; `notes` by step on the loss."""
    return _with_data(
        ("Training loss", _loss(rows, notes)),
        ("Validation loss by noise level t (EMA weights)", _validation(rows)),
        ("Reconstruction of held-out clips, PSNR in dB", _metric(rows, "val/psnr")),
        ("Distance of features, LPIPS x its weight", _metric(rows, "train/loss/lpips")),
        (
            "Patches the discriminator classifies correctly",
            _metric(rows, "train/disc/accuracy", percent, top=1.0, colour=ORANGE),
        ),
        ("Video tokens a second", _metric(rows, "train/tokens_per_second")),
        ("Share of the step spent waiting for data", _wait(rows)),
    )


def runtime_charts(rows: list[Row], events: Sequence[Event] = ()) -> list[Titled]:
    """(title, SVG element) of each chart of throughput, time, machines and loss by group that has data."""
    notes = notes_of(events)
    machine = (
        ("Memory of a rank's process, GiB", "memory/host", short),
        ("GPU memory of torch's tensors, GiB", "memory/allocated", short),
        ("GPU power, W", "gpu/power", short),
        ("GPU clock, MHz", "gpu/clock", short),
        ("GPU temperature, degrees C", "gpu/temperature", short),
        ("GPU utilisation", "gpu/utilisation", percent),
        ("GPU throttled", "gpu/throttled", percent),
    )
    return _with_data(
        ("Share of the devices' peak (MFU)", _metric(rows, "train/mfu", percent, notes)),
        ("TFLOP/s of the model, all ranks", _metric(rows, "train/tflops", short, notes)),
        ("Where the time went, share of the wall clock", goodput(rows)),
        ("Slowest rank over the mean", _metric(rows, "health/slowest_over_mean", short, notes)),
        (
            "Seconds that saves held up the run",
            _metric(rows, "checkpoint/stall_seconds", short, notes),
        ),
        ("Loss by noise level t", _groups(rows, "train/by_t/")),
        ("Loss by bucket", _groups(rows, "train/by_bucket/")),
        ("Loss by kind of conditioning", _groups(rows, "train/by_task/")),
        *((title, _over_ranks(rows, name, form, notes)) for title, name, form in machine),
    )


def notes_of(events: Sequence[Event]) -> Mapping[float, str]:
    """What is marked on the axis of steps."""
    return {
        float(event.step): event.text
        for event in events
        if event.kind in ("restart", "rollback", "failure")
    }


def series(rows: Iterable[Row], name: str) -> Series:
    """(steps, values) of the finite values of one metric."""
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    array = np.array(points, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def skipped_steps(rows: list[Row]) -> list[float]:
    """The rows by which more steps were skipped than by the row before, bar those that a roll-back took back."""
    steps: list[float] = []
    before: Row = {}
    for row in rows:
        more = row.get("train/skipped", 0.0) - before.get("train/skipped", 0.0)
        went_back = row.get("train/rollbacks", 0.0) > before.get("train/rollbacks", 0.0)
        steps += [row["step"]] if more > 0 and not went_back else []
        before = row
    return steps


def goodput(rows: list[Row]) -> str:
    """The parts of the wall clock since the run began, one on the other, over the steps."""
    rows = [row for row in rows if "goodput/productive" in row]
    if not rows:
        return ""
    names = [f"goodput/{part}" for part in TIME_PARTS]
    parts = [thin(series([{name: 0.0, **row} for row in rows], name)) for name in names]
    shares = {
        part.replace("_", " "): values for part, (_, values) in zip(TIME_PARTS, parts, strict=True)
    }
    return area_chart(parts[0][0], shares, list(TIME_PARTS.values()))


def _with_data(*drawn: Titled) -> list[Titled]:
    return [(title, svg) for title, svg in drawn if svg]


def _loss(rows: list[Row], notes: Mapping[float, str] | None = None) -> str:
    """The loss of the steps that were taken, and a mark for each that was skipped."""
    skipped = skipped_steps(rows)
    steps, values = series([row for row in rows if row["step"] not in set(skipped)], "train/loss")
    if not len(steps):
        return ""
    window = len(values) // 40
    lines = [Line((steps, values), BLUE if window < 2 else PALE_BLUE, 1.0)]
    if window > 1:
        lines.append(Line((steps, smooth(values, window)), BLUE, 2.0))
    limits = padded([float(values.min()), float(np.quantile(values, MOST))])
    return line_chart(lines, limits, plain, skipped, notes)


def _validation(rows: list[Row]) -> str:
    mean = series(rows, "val/loss")
    if not len(mean[0]):
        return ""
    names = {name for row in rows for name in row if re.fullmatch(r"val/loss/t[\d.]+", name)}
    curves = {
        f"t = {float(name.removeprefix('val/loss/t')):g}": series(rows, name)
        for name in sorted(names)
    }
    lines = [*_shaded(curves), Line(mean, FAINT, label="mean", dashes="4 3")]
    return line_chart(lines, padded(np.concatenate([line.points[1] for line in lines])), plain)


def _metric(
    rows: list[Row],
    name: str,
    form: Form = short,
    notes: Mapping[float, str] | None = None,
    top: float = 0.0,
    colour: str = BLUE,
) -> str:
    """One metric from 0 to `top`, or to a little more than its largest values."""
    steps, values = series(rows, name)
    if not len(steps):
        return ""
    limits = (0.0, top or 1.1 * float(np.quantile(values, MOST)) or 1.0)
    return line_chart([Line((steps, values), colour)], limits, form, notes=notes)


def curve_charts(rows: list[Row], prefix: str) -> list[Titled]:
    """A chart of each metric whose name begins so, but parts of a loss, which `training_charts` draws together."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(prefix))
    charts: list[Titled] = []
    for name in names:
        if "loss/" not in name:
            steps, values = series(rows, name)
            charts.append((name, line_chart([Line((steps, values), BLUE)], padded(values), short)))
    return charts


def _wait(rows: list[Row]) -> str:
    _, values = series(rows, "train/data_wait")
    most = 1.2 * float(np.quantile(values, MOST)) if len(values) else 0.0
    # Never finer than one per cent: noise of a well-fed run would look like trouble.
    top = max(0.01, min(1.0, most))
    return _metric(rows, "train/data_wait", percent, top=top, colour=ORANGE)


def _over_ranks(rows: list[Row], name: str, form: Form, notes: Mapping[float, str]) -> str:
    """A metric of each rank: its least, mean and largest value where they differ."""
    if all(row.get(f"{name}/min") == row.get(f"{name}/max") for row in rows):
        return _metric(rows, name, form, notes)
    names = {"min": f"{name}/min", "mean": name, "max": f"{name}/max"}
    lines = [
        Line(series(rows, metric), colour, label=label)
        for (label, metric), colour in zip(names.items(), LEVELS[::2], strict=True)
    ]
    top = 1.1 * float(np.quantile(np.concatenate([line.points[1] for line in lines]), MOST))
    return line_chart(lines, (0.0, top or 1.0), form, notes=notes)


def _groups(rows: list[Row], beginning: str) -> str:
    """Smoothed curves of the groups of a family; nothing where there is but one."""
    names = {name for row in rows for name in row if name.startswith(beginning)}
    # By the numbers in the names: 5 frames come before 17.
    ordered = sorted(
        names, key=lambda name: ([float(n) for n in re.findall(r"\d+\.?\d*", name)], name)
    )
    if len(ordered) < 2:
        return ""
    # Of many groups, some from the first to the last.
    step = max(1, math.ceil(len(ordered) / MAX_LINES))
    curves = {}
    for name in ordered[::step]:
        steps, values = series(rows, name)
        if len(steps):
            curves[name.removeprefix(beginning)] = steps, smooth(values, max(1, len(steps) // 20))
    if not curves:
        return ""
    values = np.concatenate([values for _, values in curves.values()])
    limits = padded([float(values.min()), float(np.quantile(values, MOST))])
    return line_chart(_shaded(curves), limits, plain)


def _shaded(curves: Mapping[str, Series]) -> list[Line]:
    """Curves by label in the colours of LEVELS, from the first to the last."""
    step = (len(LEVELS) - 1) / max(1, len(curves) - 1)
    return [
        Line(points, LEVELS[round(number * step)], label=label)
        for number, (label, points) in enumerate(curves.items())
    ]
