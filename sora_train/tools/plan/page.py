"""The plan as one HTML file: memory of the candidates beside the card's limit, time by bucket, stages on a time
line."""

from html import escape
from pathlib import Path
from typing import Any

from sora_train.base.files import write_atomically
from sora_train.monitoring.report.charts import BLUE, FAINT, GRID, ORANGE, ticks
from sora_train.tools.plan.text import pasted, percent, total_rows
from sora_train.tools.plan.time.cluster import GIB

Values = dict[str, Any]
Rows = list[tuple[str, dict[str, float]]]
WIDTH, LEFT, RIGHT, BAR, GAP, TOP, BOTTOM = 900, 230, 60, 18, 10, 8, 30
COLOURS = (
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
STYLE = """
:root { --ink: #1f2328; --faint: #6a737d; --rule: #e3e3df; --paper: #fafaf8; --card: #ffffff; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; } h2 { font-size: 20px; margin: 48px 0 4px; }
h3 { font-size: 15px; margin: 24px 0 8px; } p { margin: 0 0 12px; max-width: 85ch; } .faint { color: var(--faint); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; margin: 20px 0; }
.tile, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 14px; }
figure { margin: 12px 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; display: block; }
.tile b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; } .tile span { color: var(--faint);
font-size: 13px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; background: var(--card); border: 1px solid
var(--rule); }
th, td { padding: 6px 14px; text-align: right; border-bottom: 1px solid var(--rule); font-variant-numeric:
tabular-nums; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--faint); font-size: 13px; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 10px 14px; overflow-x:
auto; }
"""


def write_page(plan: Values, path: Path) -> None:
    """Write the page of `plan_run`'s values; raises Fault where it cannot be written."""
    write_atomically(path, page(plan))


def page(plan: Values) -> str:
    cluster, total = plan["cluster"], plan["total"]
    tiles = {
        f"{total['days']:,.1f} days": f"on {cluster['name']}",
        f"{total['gpu_hours']:,.0f}": "GPU-hours",
        f"${total['cost']:,.0f}": f"at ${cluster['price']:g} a GPU-hour",
        f"{plan['parameters'] / 1e9:.2f} B": "parameters trained",
    }
    body = [
        f"<h1>Plan of {escape(plan['name'])}</h1>",
        f'<p class="faint">{escape(cluster["name"])}: {cluster["nodes"]} node(s), {cluster["memory_gib"]:g} GiB and '
        f"{cluster['tflops']:g} TFLOP/s a GPU.</p>",
        f'<div class="tiles">{"".join(_tile(number, name) for number, name in tiles.items())}</div>',
        _figure("Stages on a time line, in days", time_line(plan["stages"])),
        _table(
            ["stage", "steps", "s a step", "MFU", "goodput", "days", "GPU-hours", "cost"],
            [list(row) for row in total_rows(plan)],
        ),
        *(_stage(stage, plan) for stage in plan["stages"]),
        "<h2>Assumptions</h2>",
        *(f"<p>{escape(note)}.</p>" for note in plan["notes"]),
        _table(["key", "value"], [[f"plan.{key}", str(value)] for key, value in plan["assumptions"].items()]),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Plan of {escape(plan['name'])}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def _stage(stage: Values, plan: Values) -> str:
    step = stage["step"]
    limit = plan["cluster"]["memory_gib"]
    memory = [
        (f"{row['layout']} ({row['options']})",
         {name: value / GIB for name, value in row["memory"].items() if name not in ("peak", "when")})
        for row in stage["candidates"]
    ]  # fmt: skip
    buckets = sorted(stage["buckets"], key=lambda row: -row["tokens"])[:12]
    times = [(f"{row['clips']} x {row['name']}", row["parts"]) for row in buckets]
    refused = "".join(
        f"<li>{escape(no['name'])}: {escape(no['reason'])}</li>" for no in stage["refused"]
    )
    paste = "\n".join(pasted(stage["overrides"]))
    return "\n".join(
        [
            f"<h2>{escape(stage['name'])}</h2>",
            f"<p>{stage['steps']:,} steps of {step['seconds']:.2f} s: MFU {percent(step['mfu'])}, "
            f"{step['tokens_per_second']:,.0f} tokens/s, {stage['hours']:,.1f} hours, ${stage['cost']:,.0f}. Layout "
            f"{escape(stage['layout'])}, memory options {escape(stage['options'])}; save every "
            f"{stage['saves']['every']} steps for a goodput of {100 * stage['saves']['goodput']:.1f} %.</p>",
            _figure("Memory of a rank by layout, GiB", bars(memory, limit, f"{limit:g} GiB")),
            _figure("A step by what it is spent on, seconds", bars([("a step", step["parts"])])),
            _figure("A micro-batch of each bucket, seconds", bars(times)),
            f"<h3>To paste</h3><pre>{escape(paste)}</pre>",
            f"<h3>Why not others</h3><ul>{refused}</ul>" if refused else "",
        ]
    )


def bars(rows: Rows, limit: float = 0.0, limit_name: str = "") -> str:
    """An SVG element: a stacked bar for each row, a legend of what is in any, and a line at `limit`."""
    names = list(
        dict.fromkeys(name for _, parts in rows for name, value in parts.items() if value > 0)
    )
    colour = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    most = max([limit, *(sum(parts.values()) for _, parts in rows)]) * 1.05 or 1.0
    legend_rows = -(-len(names) // 4)
    height = TOP + len(rows) * (BAR + GAP) + BOTTOM + 18 * legend_rows

    def x(value: float) -> float:
        return LEFT + value / most * (WIDTH - LEFT - RIGHT)

    base, drawn = TOP + len(rows) * (BAR + GAP), []
    for value in ticks(0, most):
        drawn.append(f'<path d="M{x(value):.1f} {TOP}V{base}" stroke="{GRID}"/>')
        drawn.append(_text(x(value), base + 15, f"{value:g}", "middle"))
    for number, (label, parts) in enumerate(rows):
        top, at = TOP + number * (BAR + GAP), 0.0
        drawn.append(_text(LEFT - 8, top + 13, _short(label), "end", title=label))
        for name, value in parts.items():
            if value > 0:
                drawn.append(
                    f'<rect x="{x(at):.1f}" y="{top}" width="{x(at + value) - x(at):.1f}" height="{BAR}" '
                    f'fill="{colour[name]}"><title>{escape(name)}: {value:.3g}</title></rect>'
                )
                at += value
        drawn.append(_text(x(at) + 5, top + 13, f"{at:.3g}", "start"))
    if limit:
        drawn.append(
            f'<path d="M{x(limit):.1f} {TOP - 4}V{base}" stroke="{ORANGE}" stroke-width="2"/>'
        )
        drawn.append(_text(x(limit) + 4, base + 26, limit_name, "start", ORANGE))
    for number, name in enumerate(names):
        at_x, at_y = 8 + (number % 4) * 222, base + 28 + 18 * (number // 4)
        drawn.append(f'<rect x="{at_x}" y="{at_y}" width="11" height="11" fill="{colour[name]}"/>')
        drawn.append(_text(at_x + 16, at_y + 10, name, "start"))
    return (
        f'<svg viewBox="0 0 {WIDTH} {height + 6}" role="img" font-size="12">{"".join(drawn)}</svg>'
    )


def time_line(stages: list[Values]) -> str:
    """An SVG element: each stage from its first to its last day, with its cost."""
    whole = sum(stage["hours"] for stage in stages) / 24
    height = TOP + len(stages) * (BAR + GAP) + BOTTOM
    span = WIDTH - LEFT - RIGHT - 60

    def x(day: float) -> float:
        return LEFT + day / whole * span

    base, begin, drawn = height - BOTTOM, 0.0, []
    for value in ticks(0, whole):
        drawn.append(f'<path d="M{x(value):.1f} {TOP}V{base}" stroke="{GRID}"/>')
        drawn.append(_text(x(value), base + 15, f"{value:g}", "middle"))
    for number, stage in enumerate(stages):
        top, end = TOP + number * (BAR + GAP), begin + stage["hours"] / 24
        drawn.append(_text(LEFT - 8, top + 13, _short(stage["name"]), "end"))
        drawn.append(
            f'<rect x="{x(begin):.1f}" y="{top}" width="{max(1.5, x(end) - x(begin)):.1f}" height="{BAR}" '
            f'fill="{BLUE}"/>'
        )
        drawn.append(_text(x(end) + 5, top + 13, f"${stage['cost']:,.0f}", "start"))
        begin = end
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" font-size="12">{"".join(drawn)}</svg>'


def _short(label: str, most: int = 31) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def _text(x: float, y: float, text: str, anchor: str, colour: str = FAINT, title: str = "") -> str:
    hint = f"<title>{escape(title)}</title>" if title else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}{hint}</text>'


def _tile(number: str, name: str) -> str:
    return f'<div class="tile"><b>{escape(number)}</b><span>{escape(name)}</span></div>'


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'
