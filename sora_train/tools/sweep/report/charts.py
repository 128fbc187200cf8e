"""The charts of a sweep as SVG: the metric against each swept key, and the runs' losses over their steps."""

import math
from collections.abc import Callable, Sequence
from html import escape

from sora_train.monitoring.report.charts import (
    BOTTOM,
    FAINT,
    GRID,
    HEIGHT,
    LABEL_HEIGHT,
    LEFT,
    LETTER,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    plot,
    series,
    smooth,
    spread,
    text_at,
    thin,
    ticks,
)
from sora_train.tools.sweep.report.rows import SEED, Collected, Row, as_number, by_number

# Told apart by the colour-blind too (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MOST_CURVES = 12
MOST_LETTERS = 22
EDGE = 0.06
"""Free space beside the outermost points, as a share of the axis."""
Point = tuple[float, float, str]
"""Place on the axis, value, and the run's name."""


def sweep_charts(found: Collected) -> list[tuple[str, str]]:
    """(title, SVG element) of each chart that has data."""
    drawn = [
        (f"{found.metric} by {key}", by_axis(found, key))
        for key, values in found.axes.items()
        if key != SEED and len(values) > 1
    ]
    drawn += [
        (
            "Training loss of the best runs" if len(found.rows) > MOST_CURVES else "Training loss",
            losses(found),
        )
    ]
    return [(title, svg) for title, svg in drawn if svg]


def losses(found: Collected) -> str:
    lines = []
    for number, row in enumerate(found.rows[:MOST_CURVES]):
        steps, values = series(row.metrics, "train/loss")
        if len(steps):
            curve = steps, smooth(values, max(1, len(values) // 40))
            name = shortened(", ".join(row.values.values()) or row.id)
            lines.append(
                Line(
                    thin(curve),
                    COLOURS[number % len(COLOURS)],
                    1.5,
                    name,
                    "5 3" if number >= len(COLOURS) else "",
                )
            )
    if not lines:
        return ""
    low = min(float(line.points[1].min()) for line in lines)
    high = max(float(line.points[1].max()) for line in lines)
    pad = EDGE * (high - low)
    return plot(lines, (low - pad, high + pad), lambda value: f"{value:.6g}")


def by_axis(found: Collected, key: str) -> str:
    """The metric over one key, a colour for each combination of the others; points are runs, lines go through means."""
    values = sorted({row.values[key] for row in found.rows if key in row.values}, key=by_number)
    numbers = [as_number(value) for value in values]
    known = [number for number in numbers if number is not None]
    scale = Scale(known) if len(known) == len(values) else None
    place = {
        value: scale.of(number) if scale and number is not None else float(at)
        for at, (value, number) in enumerate(zip(values, numbers, strict=True))
    }
    lines: dict[str, list[Point]] = {}
    for row in found.rows:
        value = row.final(found.metric)
        if key in row.values and math.isfinite(value):
            others = ", ".join(v for k, v in row.values.items() if k not in (key, SEED))
            lines.setdefault(others, []).append((place[row.values[key]], value, row.id))
    if not lines:
        return ""
    marks = scale.ticks() if scale else [(place[value], shortened(value)) for value in values]
    return scatter(lines, marks, key)


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


def scatter(lines: dict[str, list[Point]], marks: list[tuple[float, str]], title: str) -> str:
    points = [point for line in lines.values() for point in line]
    left, last = ends([*(p[0] for p in points), *(at for at, _ in marks)])
    low, high = ends([p[1] for p in points])
    longest = max((len(shortened(name)) for name in lines), default=0)
    right = WIDTH - RIGHT - LETTER * longest

    def x(value: float) -> float:
        return LEFT + (value - left) / (last - left) * (right - LEFT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    parts = []
    for value in ticks(low, high):
        parts.append(f'<path d="M{LEFT} {y(value):.1f}H{right:.1f}" stroke="{GRID}"/>')
        parts.append(text_at(LEFT - 8, y(value) + 4, f"{value:.6g}", "end"))
    parts.append(f'<path d="M{LEFT} {HEIGHT - BOTTOM}H{right:.1f}" stroke="#c9c9c4"/>')
    parts += [text_at(x(at), HEIGHT - BOTTOM + 17, text, "middle") for at, text in marks]
    parts.append(text_at((LEFT + right) / 2, HEIGHT - 3, title, "middle"))
    for number, line in enumerate(lines.values()):
        parts += drawn(line, COLOURS[number % len(COLOURS)], x, y)
    parts += names(lines, y, right) if len(lines) > 1 else []
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="12">{"".join(parts)}</svg>'


def drawn(
    line: list[Point], colour: str, x: Callable[[float], float], y: Callable[[float], float]
) -> list[str]:
    means = [
        (at, sum(values) / len(values))
        for at in sorted({point[0] for point in line})
        if (values := [point[1] for point in line if point[0] == at])
    ]
    path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in means)
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
        *(
            f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="3.5" fill="{colour}">'
            f"<title>{escape(name)}: {value:.6g}</title></circle>"
            for at, value, name in line
        ),
    ]


def names(lines: dict[str, list[Point]], y: Callable[[float], float], right: float) -> list[str]:
    """What each colour stands for, at the line's right end."""
    ended = sorted(
        (y(max(line)[1]), name, COLOURS[number % len(COLOURS)])
        for number, (name, line) in enumerate(lines.items())
    )
    heights = spread([at for at, _, _ in ended], LABEL_HEIGHT, TOP, HEIGHT - BOTTOM)
    return [
        text_at(right + 6, at + 4, shortened(name), "start", colour)
        for at, (_, name, colour) in zip(heights, ended, strict=True)
    ]


def ends(values: Sequence[float]) -> tuple[float, float]:
    """A little below the least to a little above the largest."""
    low, high = min(values), max(values)
    pad = EDGE * (high - low) or max(0.5 * abs(high), 0.5)
    return low - pad, high + pad


def shortened(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 1]}…"


def heat(found: Collected) -> str:
    """Of two keys, a table of the metric with its cells shaded, as HTML; nothing for another number of keys."""
    keys = [key for key, values in found.axes.items() if key != SEED and len(values) > 1]
    if len(keys) != 2:
        return ""
    down, across = (
        sorted({row.values[key] for row in found.rows if key in row.values}, key=by_number)
        for key in keys
    )
    cells = {(a, b): cell(found, {keys[0]: a, keys[1]: b}) for a in down for b in across}
    known = [value for value in cells.values() if math.isfinite(value)]
    if not known:
        return ""
    low, high = min(known), max(known)

    def shaded(value: float) -> str:
        if not math.isfinite(value):
            return f'<td class="n" style="color:{FAINT}">–</td>'
        share = (value - low) / (high - low) if high > low else 0.0
        better = share if found.more else 1 - share
        return f'<td class="n" style="background:rgba(0,114,178,{0.05 + 0.4 * better:.2f})">{value:.5g}</td>'

    head = "".join(f'<th class="n">{escape(value)}</th>' for value in across)
    body = "".join(
        f"<tr><th>{escape(a)}</th>{''.join(shaded(cells[a, b]) for b in across)}</tr>" for a in down
    )
    return (
        f'<div class="scroll"><table><thead><tr><th>{escape(keys[0])} \\ {escape(keys[1])}</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def cell(found: Collected, values: dict[str, str]) -> float:
    """Mean of the metric over the runs with these values."""
    runs: list[Row] = [row for row in found.rows if values.items() <= row.values.items()]
    finals = [value for row in runs if math.isfinite(value := row.final(found.metric))]
    return sum(finals) / len(finals) if finals else math.nan
