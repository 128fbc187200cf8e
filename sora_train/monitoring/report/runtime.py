"""The panels of how a run ran: throughput, where its time went, its machines, its losses by group, its events."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

from sora_train.monitoring.events import Event
from sora_train.monitoring.report.charts import (
    BLUE,
    BOTTOM,
    FAINT,
    HEIGHT,
    LABEL_SPACE,
    LEFT,
    LEVELS,
    ORANGE,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    Row,
    plot,
    series,
    short,
    smooth,
    text_at,
    thin,
)

PARTS = {
    "productive": BLUE,
    "data_wait": ORANGE,
    "checkpoint": "#2a788e",
    "evaluation": "#7ad151",
    "wasted": "#cf222e",
    "other": "#c9c9c4",
}
"""The parts of the wall clock, drawn from below."""
MAX_LINES = 8


def panels(rows: list[Row], events: Sequence[Event] = ()) -> list[tuple[str, str]]:
    """(title, SVG element) of each panel that has data."""
    notes = notes_of(events)
    drawn = [
        ("Share of the devices' peak (MFU)", _lines(rows, {"": "train/mfu"}, notes, percent)),
        ("TFLOP/s of the model, all ranks", _lines(rows, {"": "train/tflops"}, notes, short)),
        ("Where the time went, share of the wall clock", goodput(rows)),
        (
            "Slowest rank over the mean",
            _lines(rows, {"": "health/slowest_over_mean"}, notes, short),
        ),
        (
            "Seconds that saves held up the run",
            _lines(rows, {"": "checkpoint/stall_seconds"}, notes, short),
        ),
        ("Loss by noise level t", _groups(rows, "train/by_t/")),
        ("Loss by bucket", _groups(rows, "train/by_bucket/")),
        ("Loss by kind of conditioning", _groups(rows, "train/by_task/")),
    ]
    for title, name, form in (
        ("Memory of a rank's process, GiB", "memory/host", short),
        ("GPU memory of torch's tensors, GiB", "memory/allocated", short),
        ("GPU power, W", "gpu/power", short),
        ("GPU clock, MHz", "gpu/clock", short),
        ("GPU temperature, degrees C", "gpu/temperature", short),
        ("GPU utilisation", "gpu/utilisation", percent),
        ("GPU throttled", "gpu/throttled", percent),
    ):
        ends = {"min": f"{name}/min", "mean": name, "max": f"{name}/max"}
        if any(row.get(ends["min"]) != row.get(ends["max"]) for row in rows):
            drawn.append((title, _lines(rows, ends, notes, form)))
        else:
            drawn.append((title, _lines(rows, {"": name}, notes, form)))
    return [(title, svg) for title, svg in drawn if svg]


def notes_of(events: Sequence[Event]) -> Mapping[float, str]:
    """What is marked on the axis of steps."""
    return {
        float(event.step): event.text
        for event in events
        if event.kind in ("restart", "rollback", "failure")
    }


def percent(value: float) -> str:
    return f"{100 * value:.4g}%"


def _lines(
    rows: list[Row],
    names: Mapping[str, str],
    notes: Mapping[float, str],
    form: Callable[[float], str],
) -> str:
    colours = (BLUE,) if len(names) == 1 else (LEVELS[0], LEVELS[2], LEVELS[3])
    lines = [
        Line(series(rows, name), colour, 1.5, label)
        for (label, name), colour in zip(names.items(), colours, strict=False)
    ]
    values = np.concatenate([line.points[1] for line in lines])
    if not len(values):
        return ""
    return plot(lines, (0.0, 1.1 * float(np.quantile(values, 0.995)) or 1.0), form, notes=notes)


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
    lines = []
    for number, name in enumerate(shown := ordered[::step]):
        steps, values = series(rows, name)
        level = round(number * (len(LEVELS) - 1) / max(1, len(shown) - 1))
        smoothed = smooth(values, max(1, len(values) // 20)) if len(values) else values
        lines.append(Line((steps, smoothed), LEVELS[level], 1.5, name.removeprefix(beginning)))
    values = np.concatenate([line.points[1] for line in lines])
    if not len(values):
        return ""
    low, high = float(values.min()), float(np.quantile(values, 0.995))
    pad = 0.06 * (high - low)
    return plot(lines, (low - pad, high + pad), lambda value: f"{value:.6g}")


def goodput(rows: list[Row]) -> str:
    """The parts of the wall clock since the run began, one on the other, over the steps."""
    told = [row for row in rows if "goodput/productive" in row]
    if not told:
        return ""
    parts = [
        thin(series([{f"goodput/{part}": 0.0, **row} for row in told], f"goodput/{part}"))
        for part in PARTS
    ]
    steps = parts[0][0]
    if len(steps) == 1:
        steps = np.array([steps[0], steps[0] + 1])
        parts = [(steps, np.repeat(values, 2)) for _, values in parts]
    tops = np.minimum(np.cumsum([values for _, values in parts], axis=0), 1.0)
    floor = np.zeros_like(tops[0])
    right, bottom = WIDTH - RIGHT - 1.6 * LABEL_SPACE, HEIGHT - BOTTOM

    def place(values: np.ndarray) -> list[str]:
        across = LEFT + (steps - steps[0]) / (steps[-1] - steps[0]) * (right - LEFT)
        down = bottom - values * (bottom - TOP)
        return [f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True)]

    drawn = []
    for number, (part, colour) in enumerate(PARTS.items()):
        below = tops[number - 1] if number else floor
        points = " ".join([*place(tops[number]), *reversed(place(below))])
        share = tops[number][-1] - below[-1]
        label = f"{part.replace('_', ' ')} {100 * share:.1f}%"
        drawn.append(f'<polygon points="{points}" fill="{colour}"><title>{label}</title></polygon>')
        at = TOP + 12 + 16 * (len(PARTS) - 1 - number)
        drawn.append(f'<rect x="{right + 6}" y="{at - 9}" width="9" height="9" fill="{colour}"/>')
        drawn.append(text_at(right + 18, at, part.replace("_", " "), "start", FAINT))
    for part_of in (0.0, 0.5, 1.0):
        drawn.append(
            text_at(LEFT - 8, bottom - part_of * (bottom - TOP) + 4, percent(part_of), "end", FAINT)
        )
    for across, step, anchor in ((LEFT, steps[0], "start"), (right, steps[-1], "end")):
        drawn.append(text_at(across, bottom + 17, short(float(step)), anchor, FAINT))
    drawn.append(text_at((LEFT + right) / 2, HEIGHT - 3, "step", "middle", FAINT))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="12">{"".join(drawn)}</svg>'


def events_table(events: Sequence[Event]) -> str:
    """What happened besides the steps, as a table of HTML; empty where nothing did."""
    if not events:
        return ""
    body = "".join(
        f'<tr><td class="n">{event.step:,}</td><td>{event.kind}</td>'
        f'<td class="long">{escape(event.text[:400])}</td></tr>'
        for event in events[-100:]
    )
    more = f"<p>The last 100 of {len(events):,}.</p>" if len(events) > 100 else ""
    head = '<thead><tr><th class="n">step</th><th>what</th><th></th></tr></thead>'
    return (
        f'<h2>Events</h2>{more}<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
    )
