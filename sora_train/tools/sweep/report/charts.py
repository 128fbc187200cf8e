"""The charts of a sweep: the metric against each swept key, and the runs' losses over their steps."""

import math
from collections.abc import Sequence

from sora_train.monitoring.report.charts import (
    PALETTE,
    Line,
    Point,
    line_chart,
    padded,
    plain,
    scatter_chart,
    shortened,
    smooth,
    ticks,
)
from sora_train.monitoring.report.run_charts import series
from sora_train.tools.sweep.report.rows import SEED, Row, SweepResults, as_number, by_number

MOST_CURVES = 12
MOST_LETTERS = 22


def sweep_charts(results: SweepResults) -> list[tuple[str, str]]:
    """(title, SVG element) of each chart that has data."""
    best = " of the best runs" if len(results.rows) > MOST_CURVES else ""
    drawn = [(f"{results.metric} by {key}", by_axis(results, key)) for key in swept_keys(results)]
    drawn.append((f"Training loss{best}", losses(results)))
    return [(title, svg) for title, svg in drawn if svg]


def swept_keys(results: SweepResults) -> list[str]:
    """The keys with several values, but for the seed."""
    return [key for key, values in results.axes.items() if key != SEED and len(values) > 1]


def losses(results: SweepResults) -> str:
    lines = []
    for number, row in enumerate(results.rows[:MOST_CURVES]):
        steps, values = series(row.metrics, "train/loss")
        if len(steps):
            curve = steps, smooth(values, max(1, len(values) // 40))
            name = shortened(", ".join(row.values.values()) or row.id, MOST_LETTERS)
            dashes = "5 3" if number >= len(PALETTE) else ""
            lines.append(Line(curve, PALETTE[number % len(PALETTE)], label=name, dashes=dashes))
    if not lines:
        return ""
    limits = padded([value for line in lines for value in line.points[1]])
    return line_chart(lines, limits, plain)


def by_axis(results: SweepResults, key: str) -> str:
    """The metric over one key, a colour for each combination of the others; points are runs, lines go through means."""
    values = sorted({row.values[key] for row in results.rows if key in row.values}, key=by_number)
    numbers = [as_number(value) for value in values]
    known = [number for number in numbers if number is not None]
    scale = Scale(known) if len(known) == len(values) else None
    place = {
        value: scale.of(number) if scale and number is not None else float(at)
        for at, (value, number) in enumerate(zip(values, numbers, strict=True))
    }
    lines: dict[str, list[Point]] = {}
    for row in results.rows:
        value = row.final(results.metric)
        if key in row.values and math.isfinite(value):
            others = ", ".join(v for k, v in row.values.items() if k not in (key, SEED))
            lines.setdefault(others, []).append((place[row.values[key]], value, row.id))
    if not lines:
        return ""
    names = [(place[value], shortened(value, MOST_LETTERS)) for value in values]
    return scatter_chart(lines, scale.ticks() if scale else names, key)


class Scale:
    """Places of numbers on an axis: by their logarithm where they are positive and span more than a factor of five."""

    def __init__(self, numbers: Sequence[float]):
        self.low, self.high = min(numbers), max(numbers)
        self.log = self.low > 0 and self.high / self.low > 5

    def of(self, number: float) -> float:
        return math.log10(number) if self.log else number

    def ticks(self) -> list[tuple[float, str]]:
        if not self.log:
            high = self.high if self.high > self.low else self.low + 1
            return [(value, f"{value:.6g}") for value in ticks(self.low, high)]
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        wide = len(exponents) > 4
        values = [
            digit * 10.0**power for power in exponents for digit in ((1,) if wide else (1, 2, 5))
        ]
        inside = [value for value in values if self.low * 0.999 <= value <= self.high * 1.001]
        return [(self.of(value), f"{value:.3g}") for value in inside]


def heat(results: SweepResults) -> dict[str, object] | None:
    """Of two keys, a table of the metric and how dark to shade its cells; None for another number of keys."""
    keys = swept_keys(results)
    if len(keys) != 2:
        return None
    down, across = (
        sorted({row.values[key] for row in results.rows if key in row.values}, key=by_number)
        for key in keys
    )
    means = {(a, b): mean(results, {keys[0]: a, keys[1]: b}) for a in down for b in across}
    known = [value for value in means.values() if math.isfinite(value)]
    if not known:
        return None
    low, high = min(known), max(known)

    def shaded(value: float) -> tuple[str, float]:
        if not math.isfinite(value):
            return "–", 0.0
        share = (value - low) / (high - low) if high > low else 0.0
        return f"{value:.5g}", 0.05 + 0.4 * (share if results.more else 1 - share)

    rows = [(a, [shaded(means[a, b]) for b in across]) for a in down]
    return {"keys": keys, "across": across, "rows": rows}


def mean(results: SweepResults, values: dict[str, str]) -> float:
    """Mean of the metric over the runs with these values."""
    runs: list[Row] = [row for row in results.rows if values.items() <= row.values.items()]
    finals = [value for row in runs if math.isfinite(value := row.final(results.metric))]
    return sum(finals) / len(finals) if finals else math.nan
