"""Charts as SVG elements to be put into a page: curves over steps, stacked areas, histograms, bars, points.

Drawn here, so that a training machine needs no plotting package; text stays text in the page's
own font.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

MAX_POINTS = 1500  # more are averaged in groups: a page of a million steps must still open
WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 34
LABEL_SPACE = 54  # right of the curves, when they carry labels
LABEL_HEIGHT = 13
LETTER = 7.2  # width of a letter of the labels
MOST_LETTERS = 31
FAINT = "#6a737d"
GRID = "#ecece8"
AXIS = "#c9c9c4"
BLUE = "#1f6feb"
PALE_BLUE = "#b6d1f7"
ORANGE = "#d9730d"
# From little noise to much: viridis, which keeps its order for the colour-blind.
LEVELS = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151")
# The colour-blind can distinguish these (Okabe and Ito, 2008).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
PARTS_PALETTE = (
    "#414487",
    "#2a788e",
    "#22a884",
    "#7ad151",
    "#d9730d",
    "#b6d1f7",
    "#c9c9c4",
    "#440154",
    "#8c2d04",
    "#f2b36b",
    "#6a737d",
)
BINS = 30
BAR_WIDTH, BAR_LEFT, BAR, BAR_GAP = 900, 230, 18, 10

Series = tuple[np.ndarray, np.ndarray]
"""Steps and values."""
Limits = tuple[float, float]
Form = Callable[[float], str]
"""Writes a number of an axis."""
Point = tuple[float, float, str]
"""Place on the axis, value, and a name."""


@dataclass(frozen=True)
class Line:
    points: Series
    colour: str
    width: float = 1.5
    label: str = ""
    dashes: str = ""


@dataclass(frozen=True)
class Bar:
    """Parts laid end to end from `start`; parts of one name have one colour in all bars of a chart."""

    label: str
    parts: Mapping[str, float]
    start: float = 0.0
    note: str = ""
    """Written after the bar; the sum of the parts where it is empty."""


# --- charts ---


def line_chart(
    lines: Sequence[Line],
    limits: Limits,
    form: Form,
    skipped: Sequence[float] = (),
    notes: Mapping[float, str] | None = None,
) -> Markup:
    """`lines` over steps, values clipped to `limits`; a mark at each skipped step, and at what happened at others."""
    lines = [line for line in lines if len(line.points[0])]
    steps = [
        *skipped,
        *(step for line in lines for step in (line.points[0].min(), line.points[0].max())),
    ]
    first, last = min(steps), max(*steps, min(steps) + 1)
    frame = Frame((first, last), limits, [line.label for line in lines])
    frame.grid(form)
    frame.axis("step", [(step, short(step)) for step in ticks(first, last) if step == round(step)])
    marks = [(step, f"step {step:g} was skipped", ORANGE) for step in skipped]
    marks += [(step, text, FAINT) for step, text in (notes or {}).items() if first <= step <= last]
    for step, text, colour in marks:
        frame.upright(step, colour, tag("title", text), stroke_dasharray="4 3")
    for line in lines:
        frame.curve(line)
    frame.label_ends([(line.points[1][-1], line.label, line.colour) for line in lines])
    return frame.svg()


def area_chart(
    steps: np.ndarray, parts: Mapping[str, np.ndarray], colours: Sequence[str]
) -> Markup:
    """Shares of a whole over steps, stacked from below; `parts` by name, each with a value from 0 to 1 a step."""
    if len(steps) == 1:
        steps = np.array([steps[0], steps[0] + 1])
        parts = {name: np.repeat(values, 2) for name, values in parts.items()}
    tops = np.minimum(np.cumsum(list(parts.values()), axis=0), 1.0)
    frame = Frame((steps[0], steps[-1]), labels=[name + "  " for name in parts])
    below = np.zeros_like(tops[0])
    for number, (name, top, colour) in enumerate(zip(parts, tops, colours, strict=True)):
        outline = [*frame.points(steps, top), *reversed(frame.points(steps, below))]
        share = tag("title", f"{name} {100 * (top[-1] - below[-1]):.1f}%")
        frame.draw("polygon", share, points=" ".join(outline), fill=colour)
        at = TOP + 12 + 16 * (len(parts) - 1 - number)
        frame.swatch(frame.right + 6, at, name, colour)
        below = top
    for value in (0.0, 0.5, 1.0):
        frame.text(LEFT - 8, frame.y(value) + 4, percent(value), "end")
    frame.axis("step", [])
    for step, anchor in ((steps[0], "start"), (steps[-1], "end")):
        frame.text(frame.x(step), frame.bottom + 17, short(float(step)), anchor)
    return frame.svg()


def histogram(values: np.ndarray, unit: str, bins: int = BINS) -> Markup:
    """How many of `values` (finite, one or more) fall into each of equal bins."""
    limits = widened(float(values.min()), float(values.max()))
    counts, edges = np.histogram(values, bins, limits)
    frame = Frame(limits, (0.0, float(counts.max())))
    frame.grid(short, whole=True)
    for number in np.flatnonzero(counts):
        begin, end = frame.x(edges[number]) + 0.5, frame.x(edges[number + 1]) - 0.5
        # A single clip among millions is still seen.
        height = max(frame.bottom - frame.y(counts[number]), 1.5)
        frame.draw(
            "rect", x=begin, y=frame.bottom - height, width=end - begin, height=height, fill=BLUE
        )
    frame.axis(unit, [(value, short(value)) for value in ticks(*limits)])
    return frame.svg()


def bar_chart(bars: Sequence[Bar], limit: float = 0.0, limit_name: str = "") -> Markup:
    """A bar a row with its parts, a legend of the parts where they have names, and a line at `limit`."""
    names = [
        name
        for name in dict.fromkeys(n for bar in bars for n, v in bar.parts.items() if v > 0)
        if name
    ]
    most = max([limit, *(bar.start + sum(bar.parts.values()) for bar in bars)]) * 1.05 or 1.0
    bottom = TOP + len(bars) * (BAR + BAR_GAP)
    height = bottom + BOTTOM + 18 * math.ceil(len(names) / 4)
    frame = Frame((0.0, most), labels=["x"], width=BAR_WIDTH, height=height, left=BAR_LEFT)
    for value in ticks(0, most):
        frame.upright(value, GRID, y2=bottom)
        frame.text(frame.x(value), bottom + 15, f"{value:g}")
    for number, bar in enumerate(bars):
        top, at = TOP + number * (BAR + BAR_GAP), bar.start
        frame.text(BAR_LEFT - 8, top + 13, shortened(bar.label), "end", hint=bar.label)
        for name, value in bar.parts.items():
            if value > 0:
                colour = PARTS_PALETTE[names.index(name) % len(PARTS_PALETTE)] if name else BLUE
                width = max(1.0, frame.x(at + value) - frame.x(at))
                hint = tag("title", f"{name or bar.label}: {value:.3g}")
                frame.draw("rect", hint, x=frame.x(at), y=top, width=width, height=BAR, fill=colour)
                at += value
        frame.text(frame.x(at) + 5, top + 13, bar.note or f"{at - bar.start:.3g}", "start")
    if limit:
        frame.upright(limit, ORANGE, y2=bottom, stroke_width=2)
        frame.text(frame.x(limit) + 4, bottom + 26, limit_name, "start", ORANGE)
    for number, name in enumerate(names):
        place = 8 + (number % 4) * 222, bottom + 38 + 18 * (number // 4)
        frame.swatch(*place, name, PARTS_PALETTE[number % len(PARTS_PALETTE)])
    return frame.svg()


def scatter_chart(
    lines: Mapping[str, Sequence[Point]], axis: Sequence[tuple[float, str]], unit: str
) -> Markup:
    """Points with a line through the means of those at one place, a colour a line; `axis`: places and their names."""
    points = [point for line in lines.values() for point in line]
    across = padded([*(point[0] for point in points), *(at for at, _ in axis)])
    labels = [shortened(name, 22) if len(lines) > 1 else "" for name in lines]
    frame = Frame(across, padded([point[1] for point in points]), labels)
    frame.grid(plain)
    frame.axis(unit, axis)
    ends = []
    for number, (line, label) in enumerate(zip(lines.values(), labels, strict=True)):
        colour = PALETTE[number % len(PALETTE)]
        places = np.array(sorted({at for at, _, _ in line}))
        means = np.array([np.mean([value for x, value, _ in line if x == at]) for at in places])
        frame.curve(Line((places, means), colour))
        for at, value, name in line:
            hint = tag("title", f"{name}: {value:.6g}")
            frame.draw("circle", hint, cx=frame.x(at), cy=frame.y(value), r=3.5, fill=colour)
        ends.append((means[-1], label, colour))
    frame.label_ends(ends)
    return frame.svg()


# --- what they are drawn with ---


class Frame:
    """The area between a chart's axes: where values lie in the picture, in pixels, and what is drawn so far."""

    def __init__(
        self,
        across: Limits,
        up: Limits = (0.0, 1.0),
        labels: Sequence[str] = (),
        width: float = WIDTH,
        height: float = HEIGHT,
        left: float = LEFT,
    ):
        self.across, self.up = across, widened(*up)
        self.width, self.height = width, height
        self.left, self.top, self.bottom = left, TOP, height - BOTTOM
        longest = max(map(len, labels), default=0)
        self.right = width - RIGHT - (max(LABEL_SPACE, LETTER * longest) if longest else 0)
        self.parts: list[Markup] = []

    def x(self, value: Any) -> Any:
        low, high = self.across
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: Any) -> Any:
        low, high = self.up
        share = (np.clip(value, low, high) - low) / (high - low)
        return self.bottom - share * (self.bottom - self.top)

    def points(self, places: np.ndarray, values: np.ndarray) -> list[str]:
        pairs = zip(self.x(places), self.y(values), strict=True)
        return [f"{x:.1f},{y:.1f}" for x, y in pairs]

    def draw(self, name: str, *inside: str, **attributes: object) -> None:
        self.parts.append(tag(name, *inside, **attributes))

    def upright(self, place: float, colour: str, *inside: str, **attributes: object) -> None:
        """A vertical line over the whole height, or down to `y2`."""
        ends = {"x1": self.x(place), "x2": self.x(place), "y1": self.top, "y2": self.bottom}
        self.draw("line", *inside, **(ends | {"stroke": colour} | attributes))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        anchor: str = "middle",
        colour: str = FAINT,
        hint: str = "",
    ) -> None:
        inside = [text, tag("title", hint)] if hint else [text]
        self.draw("text", *inside, x=x, y=y, text_anchor=anchor, fill=colour)

    def swatch(self, x: float, y: float, name: str, colour: str) -> None:
        """An entry of a legend."""
        self.draw("rect", x=x, y=y - 10, width=11, height=11, fill=colour)
        self.text(x + 16, y, name, "start")

    def grid(self, form: Form, whole: bool = False) -> None:
        """Horizontal lines and their numbers; with `whole`, at whole numbers alone."""
        for value in ticks(*self.up):
            if not whole or value == round(value):
                self.draw(
                    "path", d=f"M{self.left} {self.y(value):.1f}H{self.right:.1f}", stroke=GRID
                )
                self.text(self.left - 8, self.y(value) + 4, form(value), "end")

    def axis(self, unit: str, marks: Iterable[tuple[float, str]]) -> None:
        """The axis below: its unit, and text at some places."""
        self.draw("path", d=f"M{self.left} {self.bottom}H{self.right:.1f}", stroke=AXIS)
        for at, text in marks:
            self.draw("path", d=f"M{self.x(at):.1f} {self.bottom}v4", stroke=AXIS)
            self.text(self.x(at), self.bottom + 17, text)
        self.text((self.left + self.right) / 2, self.height - 3, unit)

    def curve(self, line: Line) -> None:
        places, values = thin(line.points)
        if len(places) == 1:
            self.draw("circle", cx=self.x(places[0]), cy=self.y(values[0]), r=3, fill=line.colour)
            return
        self.draw(
            "polyline",
            points=" ".join(self.points(places, values)),
            fill="none",
            stroke=line.colour,
            stroke_width=line.width,
            stroke_linejoin="round",
            **({"stroke_dasharray": line.dashes} if line.dashes else {}),
        )

    def label_ends(self, ends: Iterable[tuple[float, str, str]]) -> None:
        """(value, label, colour) of curves at their right ends, moved apart where labels would overlap."""
        placed = sorted((self.y(value), label, colour) for value, label, colour in ends if label)
        heights = spread([at for at, _, _ in placed], LABEL_HEIGHT, self.top, self.bottom)
        for at, (_, label, colour) in zip(heights, placed, strict=True):
            self.text(self.right + 6, at + 4, label, "start", colour)

    def svg(self) -> Markup:
        view = f"0 0 {self.width:g} {self.height:g}"
        return tag("svg", *self.parts, viewBox=view, role="img", font_size=12)


def tag(name: str, *inside: str, **attributes: object) -> Markup:
    """An SVG element: texts are escaped, numbers rounded to tenths, `_` in the attributes' names becomes `-`."""
    words = Markup("").join(
        Markup(' {}="{}"').format(
            key.replace("_", "-"), f"{value:.1f}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
    )
    if not inside:
        return Markup(f"<{name}{words}/>")
    return Markup(f"<{name}{words}>{Markup('').join(inside)}</{name}>")


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


def padded(values: Sequence[float] | np.ndarray, share: float = 0.06) -> Limits:
    """A little below the least to a little above the largest value."""
    low, high = float(np.min(values)), float(np.max(values))
    pad = share * (high - low)
    return widened(low - pad, high + pad)


def widened(low: float, high: float) -> Limits:
    """Limits that differ, so that equal values can be drawn too."""
    return (low - 0.5, high + 0.5) if high - low < 1e-9 * max(1.0, abs(high)) else (low, high)


def plain(value: float) -> str:
    return f"{value:.6g}"


def percent(value: float) -> str:
    return f"{100 * value:.4g}%"


def short(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{letter}"
    return plain(value)


def shortened(text: str, most: int = MOST_LETTERS) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
