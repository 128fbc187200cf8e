"""The status of runs as text: one screen for one run, or a line for each of many."""

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sora_train.base.progress import duration
from sora_train.monitoring.status import RunStatus

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 40
MAX_EVENTS = 4
MAX_GROUPS = 8
COLOURS = {
    "running": "green",
    "finished": "green",
    "left": "yellow",
    "new": "yellow",
    "stalled": "red",
    "silent": "red",
    "failed": "red",
}


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """Finite `values` as at most `width` blocks, each the mean of its share of them; their range fills the height."""
    kept = [value for value in values if math.isfinite(value)]
    if not kept:
        return ""
    width = min(width, len(kept))
    edges = [round(i * len(kept) / width) for i in range(width + 1)]
    means = [sum(kept[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    span = high - low
    levels = [round((mean - low) / span * (len(BLOCKS) - 1)) if span else 3 for mean in means]
    return "".join(BLOCKS[level] for level in levels)


def bar(share: float, width: int = 24) -> Text:
    full = round(min(max(share, 0.0), 1.0) * width)
    return Text("━" * full, style="cyan") + Text("━" * (width - full), style="bright_black")


def page(status: RunStatus) -> RenderableType:
    """One run on a screen of 80 columns or more."""
    parts: list[RenderableType] = [_head(status)]
    if status.rows:
        parts += [_numbers(status)]
        parts += [part for part in (_groups(status), _goodput(status)) if part is not None]
    parts += [_event(event.kind, event.text) for event in status.events[-MAX_EVENTS:]]
    title = Text(str(status.run_dir), style="bold")
    return Panel(Group(*parts), title=title, title_align="left", border_style=COLOURS[status.state])


def _head(status: RunStatus) -> RenderableType:
    line = Text(no_wrap=False)
    line.append(status.state.upper(), style=f"bold {COLOURS[status.state]}")
    line.append(f"  {status.why}\n")
    if status.steps:
        share = status.step / status.steps
        line.append(f"step {status.step:,} of {status.steps:,}  ")
        line.append_text(bar(share))
        line.append(f" {share:.1%}")
    else:
        line.append(f"step {status.step:,}")
    if status.eta is not None and status.state in ("running", "stalled"):
        line.append(f"  ETA {duration(status.eta)}")
    return line


def _event(kind: str, text: str) -> Text:
    colour = "yellow" if kind in ("restart", "quarantine") else "red"
    return Text.assemble((f"{kind}: ", colour), " ".join(text.split())[:300])


def _numbers(status: RunStatus) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    for _ in range(4):
        grid.add_column()
    for side in range(0, 4, 2):
        grid.columns[side].style = "bright_black"
    cells = [cell for cell in _cells(status) if cell[1]]
    for left, right in zip(cells[::2], [*cells[1::2], ("", "")], strict=False):
        grid.add_row(*left, *right)
    losses = [row["train/loss"] for row in status.rows if "train/loss" in row]
    trend = status.trend
    line = Text.assemble(("loss  ", "bright_black"), f"{losses[-1]:.4g}  " if losses else "none  ")
    line.append(sparkline(losses), style="cyan")
    if trend is not None:
        line.append(f"  {trend:+.1%} from its first half", style="green" if trend < 0 else "yellow")
    return Group(line, grid)


def _cells(status: RunStatus) -> list[tuple[str, str]]:
    last, recent = status.last, status.recent
    worst = last.get("health/slowest_over_mean")
    memory = last.get(
        "gpu/memory/max", last.get("memory/allocated/max", last.get("memory/host/max"))
    )
    saved = ""
    if status.checkpoint is not None:
        age = duration(max(0.0, status.now - status.checkpoint[1]))
        saved = f"step {status.checkpoint[0]:,}, {age} ago"
    return [
        ("validation", form(last.get("val/loss"), "{:.4g}")),
        ("checkpoint", saved),
        ("lr", form(last.get("train/lr"), "{:.3g}")),
        ("grad norm", form(recent("train/grad_norm"), "{:.3g}")),
        ("step", form(recent("train/step_seconds"), "{:.3g} s")),
        ("tokens/s", form(recent("train/tokens_per_second"), "{:,.0f}")),
        ("TFLOP/s", tflops(recent("train/tflops"))),
        ("MFU", form(recent("train/mfu"), "{:.1%}")),
        ("data wait", form(recent("train/data_wait"), "{:.1%}")),
        ("encoding", form(recent("train/encode_seconds"), "{:.3g} s")),
        ("padding", form(recent("train/padding"), "{:.1%}")),
        ("imbalance", form(None if worst is None else worst - 1.0, "{:.1%}")),
        ("slowest rank", form(last.get("health/slowest_rank"), "{:.0f}")),
        ("memory, most", form(memory, "{:.3g} GiB")),
        ("GPU power", form(last.get("gpu/power"), "{:.0f} W")),
        ("GPU hottest", form(last.get("gpu/temperature/max"), "{:.0f} °C")),
        ("GPU throttled", form(last.get("gpu/throttled"), "{:.1%}")),
        ("dropped", form(last.get("train/dropped"), "{:,.0f} clips")),
        ("skipped", form(last.get("train/skipped"), "{:,.0f} steps")),
    ]


def tflops(value: float | None) -> str:
    return form(value, "{:,.0f}" if value is not None and value >= 100 else "{:.3g}")


def form(value: float | None, how: str) -> str:
    return "" if value is None else how.format(value)


def _groups(status: RunStatus) -> RenderableType | None:
    """The loss by band, bucket and task, side by side; nothing for a group of one."""
    tables = []
    for name, beginning in (
        ("t", "train/by_t/"),
        ("bucket", "train/by_bucket/"),
        ("task", "train/by_task/"),
    ):
        values = status.family(beginning)
        if len(values) < 2:
            continue
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bright_black")
        table.add_column(name)
        table.add_column("loss", justify="right")
        for label, value in list(values.items())[:MAX_GROUPS]:
            table.add_row(label, f"{value:.4g}")
        if len(values) > MAX_GROUPS:
            table.add_row(f"and {len(values) - MAX_GROUPS} more", "")
        tables.append(table)
    if not tables:
        return None
    grid = Table.grid(padding=(0, 3))
    grid.add_row(*tables)
    return grid


def _goodput(status: RunStatus) -> RenderableType | None:
    last = status.last
    if "goodput/productive" not in last:
        return None
    line = Text.assemble(
        ("goodput  ", "bright_black"), (f"{last['goodput/productive']:.1%}", "bold")
    )
    line.append(f" of {duration(last['goodput/seconds'])};")
    lost = {
        name: last.get(f"goodput/{name}", 0.0)
        for name in ("data_wait", "checkpoint", "evaluation", "wasted", "other")
    }
    parts = [
        f" {name.replace('_', ' ')} {share:.1%}" for name, share in lost.items() if share >= 5e-4
    ]
    return line.append(",".join(parts) or " nothing lost")


def table(statuses: Sequence[RunStatus | tuple[str, str]]) -> Table:
    """A line for each run; one that cannot be read is a name with the reason."""
    shown = Table(box=None, header_style="bright_black", padding=(0, 1, 0, 0))
    # A sweep tells its runs apart at the ends of their names.
    shown.add_column("run", overflow="fold")
    for name in ("state", "step", "ETA", "loss", "val", "tokens/s", "goodput"):
        shown.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    for one in statuses:
        if isinstance(one, tuple):
            shown.add_row(one[0], Text("unreadable", style="red"), *[""] * 6)
            continue
        of = f"{one.step:,}/{one.steps:,}" if one.steps else f"{one.step:,}"
        eta = one.eta if one.state in ("running", "stalled") else None
        shown.add_row(
            one.run_dir.name,
            Text(one.state, style=COLOURS[one.state]),
            of,
            "" if eta is None else duration(eta),
            form(one.recent("train/loss"), "{:.4g}"),
            form(one.last.get("val/loss"), "{:.4g}"),
            form(one.recent("train/tokens_per_second"), "{:,.0f}"),
            form(one.last.get("goodput/productive"), "{:.0%}"),
        )
    return shown
