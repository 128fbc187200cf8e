"""A sweep told: on the terminal, as CSV, Markdown and a page. All four are made of the same rows."""

import csv
import io
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from sora_train.base.progress import duration
from sora_train.monitoring.report.page import render
from sora_train.tools.sweep.report.charts import heat, sweep_charts
from sora_train.tools.sweep.report.compare import Compared
from sora_train.tools.sweep.report.rows import Collected

Table = tuple[list[str], list[list[str]]]
"""Heads and cells."""


def csv_text(found: Collected) -> str:
    """One line a run, numbers in full precision; a run without the metric has an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["id", *found.axes, "state", "step", found.metric, "best", "seconds"])
    for row in found.rows:
        numbers = (row.final(found.metric), row.best(found.metric, found.more), row.seconds)
        told = ["" if math.isnan(value) else repr(float(value)) for value in numbers]
        values = [row.values.get(key, "") for key in found.axes]
        writer.writerow([row.id, *values, row.state, row.step, *told])
    return out.getvalue()


def runs_table(found: Collected) -> Table:
    rows = []
    for row in found.rows:
        numbers = (row.final(found.metric), row.best(found.metric, found.more))
        values = [row.values.get(key, "") for key in found.axes] or [row.id]
        rows.append(
            [*values, row.state, f"{row.step:,}", *map(number, numbers), duration(row.seconds)]
        )
    return [*(found.axes or ["run"]), "state", "steps", found.metric, "best", "time"], rows


def compared_table(compared: Sequence[Compared], confidence: float) -> Table:
    heads = ["run", "of", "difference", f"{confidence:.0%} interval", "without pairing", "over"]
    rows = []
    for one in compared:
        found = one.difference
        if found is None:
            rows.append([one.name, "", f"not compared: {one.why}", "", "", ""])
            continue
        told = math.isfinite(found.low)
        interval = f"{found.low:+.4g} to {found.high:+.4g}" if told else "too little to tell"
        apart = f"±{found.unpaired / 2:.4g}" if told else ""
        rows.append([one.name, one.of, f"{found.mean:+.4g}", interval, apart, found.over])
    return heads, rows


def notes(found: Collected, base: str, compared: Sequence[Compared]) -> list[str]:
    """How to read the tables, in sentences."""
    said = [f"By {found.told}."]
    if any(one.difference for one in compared):
        said.append(
            f"Differences are to {base}. Runs of one seed meet the same clips with the same noise, so they are taken "
            "step by step (over the last half of the steps) or seed by seed, and the luck of the draw goes out; "
            "'without pairing' is what the interval would have been. An interval that holds 0 tells no difference."
        )
    bad = [row for row in found.rows if row.state in ("failed", "silent", "stalled")]
    said += [f"{row.id} {row.state}: {row.why}." for row in bad]
    return said


def following(found: Collected) -> list[str]:
    """Commands that go on from here."""
    best = found.rows[0]
    if not math.isfinite(best.final(found.metric)):
        return []
    folder = shlex.quote(str(found.folder / best.id))
    return [f'sora sample --ckpt {folder} --prompt "..."']


def markdown_text(
    found: Collected, base: str, compared: Sequence[Compared], confidence: float
) -> str:
    parts = [f"# {found.folder.resolve().name}", *notes(found, base, compared)]
    parts.append(_markdown(runs_table(found)))
    if compared:
        parts += [f"## Against {base}", _markdown(compared_table(compared, confidence))]
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    heads, rows = table

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, rows)])


def page_text(found: Collected, base: str, compared: Sequence[Compared], confidence: float) -> str:
    """One file that needs no network."""
    metric, *sentences = notes(found, base, compared)
    return render(
        "tools/sweep/report/report.html",
        title=found.folder.resolve().name,
        runs=len(found.rows),
        metric=metric,
        tiles=tiles(found),
        table=runs_table(found),
        base=base,
        compared=compared_table(compared, confidence) if compared else None,
        sentences=sentences,
        heat=heat(found),
        charts=sweep_charts(found),
    )


def tiles(found: Collected) -> dict[str, str]:
    best = found.rows[0]
    done = sum(row.state == "finished" for row in found.rows)
    return {
        "runs finished": f"{done} of {len(found.rows)}",
        f"best {found.metric}": number(best.final(found.metric)),
        "time of all steps": duration(sum(row.seconds for row in found.rows)),
    } | {f"{key} of the best": value for key, value in best.values.items()}


def number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.5g}"


def written(
    found: Collected, base: str, compared: Sequence[Compared], confidence: float
) -> dict[str, str]:
    """The files of a report by their endings."""
    return {
        "csv": csv_text(found),
        "md": markdown_text(found, base, compared, confidence),
        "html": page_text(found, base, compared, confidence),
    }


def default_paths(folder: Path) -> dict[str, Path]:
    return {ending: folder / f"sweep_report.{ending}" for ending in ("csv", "md", "html")}
