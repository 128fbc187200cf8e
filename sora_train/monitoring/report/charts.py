"""The curves of a run as SVG to be put into a page: loss, validation by noise level, throughput; and histograms.

Drawn by hand, so that a training machine needs no plotting package; text stays text in the page's
own font.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

MAX_POINTS = 1500  # more are averaged in groups: a page of a million steps must still open
WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 34
LABEL_SPACE = 54  # right of the curves, when they carry labels
LABEL_HEIGHT = 13
LETTER = 7.2  # width of a letter of the labels
FAINT = "#6a737d"
GRID = "#ecece8"
BLUE = "#1f6feb"
PALE_BLUE = "#b6d1f7"
ORANGE = "#d9730d"
# From little noise to much: viridis, which keeps its order for the colour-blind.
LEVELS = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151")

BINS = 30

Row = dict[str, float]
Series = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Line:
    points: Series
    colour: str
    width: float = 1.5
    label: str = ""
    dashes: str = ""


def charts(rows: list[Row], notes: Mapping[float, str] | None = None) -> list[tuple[str, str]]:
    """(title, SVG element) of each chart that has data; rows as in metrics.jsonl, `notes` by step on the loss."""
    drawn = (
        ("Training loss", _loss(rows, notes)),
        ("Validation loss by noise level t (EMA weights)", _validation(rows)),
        ("Reconstruction of held-out clips, PSNR in dB", _single(rows, "val/psnr", BLUE, short)),
        (
            "Distance of features, LPIPS x its weight",
            _single(rows, "train/loss/lpips", BLUE, short),
        ),
        ("Patches the discriminator tells rightly", _share(rows, "train/disc/accuracy")),
        ("Video tokens a second", _single(rows, "train/tokens_per_second", BLUE, short)),
        ("Share of the step spent waiting for data", _wait(rows)),
    )
    return [(title, svg) for title, svg in drawn if svg]


def series(rows: Iterable[Row], name: str) -> Series:
    """(steps, values) of the finite values of one metric."""
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    array = np.array(points, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the up to `window` values around each, same length; shorter windows at the ends."""
    ones = np.ones(min(window, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def thin(points: Series, limit: int = MAX_POINTS) -> Series:
    """At most `limit` points: the means of equal groups of neighbours."""
    steps, values = points
    if len(steps) <= limit:
        return points
    groups = np.array_split(np.arange(len(steps)), limit)
    return (
        np.array([steps[group].mean() for group in groups]),
        np.array([values[group].mean() for group in groups]),
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from `low` to `high`, steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.75)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def skipped_steps(rows: list[Row]) -> list[float]:
    """The rows by which more steps were skipped than by the row before, bar those that a roll-back took back."""
    found: list[float] = []
    before: Row = {}
    for row in rows:
        more = row.get("train/skipped", 0.0) - before.get("train/skipped", 0.0)
        went_back = row.get("train/rollbacks", 0.0) > before.get("train/rollbacks", 0.0)
        found += [row["step"]] if more > 0 and not went_back else []
        before = row
    return found


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
    # One early spike must not flatten the rest of the curve.
    low, high = float(values.min()), float(np.quantile(values, 0.995))
    pad = 0.06 * (high - low)
    return plot(lines, (low - pad, high + pad), _plain, skipped, notes)


def _validation(rows: list[Row]) -> str:
    mean = series(rows, "val/loss")
    if not len(mean[0]):
        return ""
    names = sorted(
        {name for row in rows for name in row if re.fullmatch(r"val/loss/t[\d.]+", name)}
    )
    lines = []
    for number, name in enumerate(names):
        level = round(number * (len(LEVELS) - 1) / max(1, len(names) - 1))
        label = f"t = {float(name.removeprefix('val/loss/t')):g}"
        lines.append(Line(series(rows, name), LEVELS[level], 1.5, label))
    lines.append(Line(mean, FAINT, 1.5, "mean", dashes="4 3"))
    values = np.concatenate([line.points[1] for line in lines])
    low, high = float(values.min()), float(values.max())
    pad = 0.06 * (high - low)
    return plot(lines, (low - pad, high + pad), _plain)


def _single(rows: list[Row], name: str, colour: str, form: Callable[[float], str]) -> str:
    points = series(rows, name)
    if not len(points[0]):
        return ""
    return plot([Line(points, colour)], (0, 1.1 * float(np.quantile(points[1], 0.995))), form)


def _share(rows: list[Row], name: str) -> str:
    points = series(rows, name)
    if not len(points[0]):
        return ""
    return plot([Line(points, ORANGE)], (0, 1), lambda value: f"{100 * value:g}%")


def _wait(rows: list[Row]) -> str:
    points = series(rows, "train/data_wait")
    if not len(points[0]):
        return ""
    # Never finer than one per cent: noise of a well-fed run would look like trouble.
    top = max(0.01, min(1.0, 1.2 * float(np.quantile(points[1], 0.995))))
    return plot([Line(points, ORANGE)], (0, top), lambda value: f"{100 * value:g}%")


def _plain(value: float) -> str:
    return f"{value:.6g}"


def short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return _plain(value)


def plot(
    lines: list[Line],
    limits: tuple[float, float],
    form: Callable[[float], str],
    marks: Sequence[float] = (),
    notes: Mapping[float, str] | None = None,
) -> str:
    """An SVG element: `lines` over steps, values within `limits`, `form` writes the axis's numbers; `marks` are
    steps that were skipped, `notes` what happened at others."""
    low, high = limits
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    first = min(
        *marks, *(float(line.points[0].min()) for line in lines if len(line.points[0])), math.inf
    )
    last = max(
        *marks, *(float(line.points[0].max()) for line in lines if len(line.points[0])), -math.inf
    )
    last = max(last, first + 1)
    longest = max((len(line.label) for line in lines), default=0)
    right = WIDTH - RIGHT - (max(LABEL_SPACE, LETTER * longest) if longest else 0)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (right - LEFT)

    def y(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    parts = [*_grid(x, y, (first, last), (low, high), form, right)]
    parts += [
        f'<line x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{ORANGE}" '
        f'stroke-dasharray="2 3"><title>step {step:g} was skipped</title></line>'
        for step in marks
    ]
    parts += [
        f'<line x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{FAINT}" '
        f'stroke-dasharray="5 3"><title>{escape(text)}</title></line>'
        for step, text in (notes or {}).items()
        if first <= step <= last
    ]
    parts += [_polyline(line, x, y) for line in lines if len(line.points[0])]
    parts += _labels([line for line in lines if line.label and len(line.points[0])], y, right)
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="12">{body}</svg>'


def histogram(values: np.ndarray, unit: str, bins: int = BINS) -> str:
    """An SVG element: how many of `values` (finite, one or more) fall into each of equal bins."""
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, bins, (low, high))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    top = float(counts.max())

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (right - LEFT)

    def y(count: float) -> float:
        return bottom - count / top * (bottom - TOP)

    parts = []
    for value in ticks(0, top):
        if value == round(value):
            parts.append(f'<path d="M{LEFT} {y(value):.1f}H{right}" stroke="{GRID}"/>')
            parts.append(text_at(LEFT - 8, y(value) + 4, short(value), "end"))
    for number in np.flatnonzero(counts):
        begin, end = x(edges[number]) + 0.5, x(edges[number + 1]) - 0.5
        at = min(y(counts[number]), bottom - 1.5)  # a single clip among millions is still seen
        parts.append(
            f'<path d="M{begin:.1f} {bottom}V{at:.1f}H{end:.1f}V{bottom}Z" fill="{BLUE}"/>'
        )
    parts.append(f'<path d="M{LEFT} {bottom}H{right}" stroke="#c9c9c4"/>')
    parts += [text_at(x(value), bottom + 17, short(value), "middle") for value in ticks(low, high)]
    parts.append(text_at((LEFT + right) / 2, HEIGHT - 3, unit, "middle"))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="12">{"".join(parts)}</svg>'


def _grid(
    x: Callable[[float], float],
    y: Callable[[float], float],
    steps: tuple[float, float],
    limits: tuple[float, float],
    form: Callable[[float], str],
    right: float,
) -> Iterable[str]:
    bottom = HEIGHT - BOTTOM
    for value in ticks(*limits):
        at = y(value)
        yield f'<path d="M{LEFT} {at:.1f}H{right}" stroke="{GRID}"/>'
        yield text_at(LEFT - 8, at + 4, form(value), "end")
    yield f'<path d="M{LEFT} {bottom}H{right}" stroke="#c9c9c4"/>'
    for step in ticks(*steps):
        if step == round(step):
            yield f'<path d="M{x(step):.1f} {bottom}v4" stroke="#c9c9c4"/>'
            yield text_at(x(step), bottom + 17, short(step), "middle")
    yield text_at((LEFT + right) / 2, HEIGHT - 3, "step", "middle")


def _polyline(line: Line, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    steps, values = thin(line.points)
    if len(steps) == 1:
        return (
            f'<circle cx="{x(steps[0]):.1f}" cy="{y(values[0]):.1f}" r="3" fill="{line.colour}"/>'
        )
    points = " ".join(
        f"{x(step):.1f},{y(value):.1f}" for step, value in zip(steps, values, strict=True)
    )
    dashes = f' stroke-dasharray="{line.dashes}"' if line.dashes else ""
    return (
        f'<polyline points="{points}" fill="none" stroke="{line.colour}" '
        f'stroke-width="{line.width}" stroke-linejoin="round"{dashes}/>'
    )


def _labels(lines: list[Line], y: Callable[[float], float], right: float) -> Iterable[str]:
    """The names of the curves at their right ends, moved apart where they would overlap."""
    ends = sorted(lines, key=lambda line: y(line.points[1][-1]))
    heights = spread([y(line.points[1][-1]) for line in ends], LABEL_HEIGHT, TOP, HEIGHT - BOTTOM)
    return [
        text_at(right + 6, at + 4, line.label, "start", line.colour)
        for line, at in zip(ends, heights, strict=True)
    ]


def spread(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """Sorted `places` moved as little as needed to lie `gap` apart, inside low..high if they fit."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else max(place, low))
    limit = high
    for number in reversed(range(len(moved))):
        moved[number] = min(moved[number], limit)
        limit = moved[number] - gap
    return moved


def text_at(x: float, y: float, text: str, anchor: str, colour: str = FAINT) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
