"""The report of a sweep: on the terminal, as CSV, Markdown and a page, all four from the same rows."""

import csv
import io
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from sora_train.base.console import plain_console
from sora_train.base.files import write_atomically
from sora_train.base.progress import duration
from sora_train.monitoring.report.page import render
from sora_train.tools.sweep.report.charts import heat, sweep_charts
from sora_train.tools.sweep.report.compare import GroupComparison
from sora_train.tools.sweep.report.rows import SweepResults

Table = tuple[list[str], list[list[str]]]
"""Heads and cells."""


def csv_text(results: SweepResults) -> str:
    """One line a run, numbers in full precision; a run without the metric has an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["id", *results.axes, "state", "step", results.metric, "best", "seconds"])
    for row in results.rows:
        numbers = (row.final(results.metric), row.best(results.metric, results.more), row.seconds)
        cells = ["" if math.isnan(value) else repr(float(value)) for value in numbers]
        values = [row.values.get(key, "") for key in results.axes]
        writer.writerow([row.id, *values, row.state, row.step, *cells])
    return out.getvalue()


def runs_table(results: SweepResults) -> Table:
    rows = []
    for row in results.rows:
        numbers = (row.final(results.metric), row.best(results.metric, results.more))
        values = [row.values.get(key, "") for key in results.axes] or [row.id]
        rows.append(
            [*values, row.state, f"{row.step:,}", *map(number, numbers), duration(row.seconds)]
        )
    return [*(results.axes or ["run"]), "state", "steps", results.metric, "best", "time"], rows


def compared_table(compared: Sequence[GroupComparison], confidence: float) -> Table:
    heads = ["run", "of", "difference", f"{confidence:.0%} interval", "without pairing", "over"]
    rows = []
    for one in compared:
        difference = one.difference
        if difference is None:
            rows.append([one.name, "", f"not compared: {one.why}", "", "", ""])
            continue
        known = math.isfinite(difference.low)
        interval = (
            f"{difference.low:+.4g} to {difference.high:+.4g}" if known else "too little to tell"
        )
        apart = f"±{difference.unpaired / 2:.4g}" if known else ""
        rows.append([one.name, one.of, f"{difference.mean:+.4g}", interval, apart, difference.over])
    return heads, rows


def notes(results: SweepResults, base: str, compared: Sequence[GroupComparison]) -> list[str]:
    """How to read the tables, in sentences."""
    sentences = [f"By {results.criterion}."]
    if any(one.difference for one in compared):
        sentences.append(
            f"Differences are to {base}. Runs of one seed meet the same clips with the same noise, so they are taken "
            "step by step (over the last half of the steps) or seed by seed, and the luck of the draw goes out; "
            "'without pairing' is what the interval would have been. An interval that holds 0 tells no difference."
        )
    bad = [row for row in results.rows if row.state in ("failed", "silent", "stalled")]
    sentences += [f"{row.id} {row.state}: {row.why}." for row in bad]
    return sentences


def next_commands(results: SweepResults) -> list[str]:
    """Commands to run next."""
    best = results.rows[0]
    if not math.isfinite(best.final(results.metric)):
        return []
    folder = shlex.quote(str(results.folder / best.id))
    return [f'sora sample --ckpt {folder} --prompt "..."']


def markdown_text(
    results: SweepResults, base: str, compared: Sequence[GroupComparison], confidence: float
) -> str:
    parts = [f"# {results.folder.resolve().name}", *notes(results, base, compared)]
    parts.append(_markdown(runs_table(results)))
    if compared:
        parts += [f"## Against {base}", _markdown(compared_table(compared, confidence))]
    return "\n\n".join(parts) + "\n"


def _markdown(table: Table) -> str:
    heads, rows = table

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, rows)])


def page_text(
    results: SweepResults, base: str, compared: Sequence[GroupComparison], confidence: float
) -> str:
    """One file that needs no network."""
    metric, *sentences = notes(results, base, compared)
    return render(
        "tools/sweep/report/report.html",
        title=results.folder.resolve().name,
        runs=len(results.rows),
        metric=metric,
        tiles=tiles(results),
        table=runs_table(results),
        base=base,
        compared=compared_table(compared, confidence) if compared else None,
        sentences=sentences,
        heat=heat(results),
        charts=sweep_charts(results),
    )


def tiles(results: SweepResults) -> dict[str, str]:
    best = results.rows[0]
    done = sum(row.state == "finished" for row in results.rows)
    return {
        "runs finished": f"{done} of {len(results.rows)}",
        f"best {results.metric}": number(best.final(results.metric)),
        "time of all steps": duration(sum(row.seconds for row in results.rows)),
    } | {f"{key} of the best": value for key, value in best.values.items()}


def number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.5g}"


def print_report(
    results: SweepResults, base: str, compared: Sequence[GroupComparison], confidence: float
) -> None:
    console = plain_console()
    print_table(console, "Runs", runs_table(results))
    if compared:
        print_table(console, f"Against {base}", compared_table(compared, confidence))
    for sentence in notes(results, base, compared):
        console.print(sentence)


def print_table(console: Console, title: str, table: Table) -> None:
    heads, rows = table
    drawn = RichTable(title=title, title_justify="left")
    for head in heads:
        drawn.add_column(head, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    console.print(drawn)


def write_report(
    folder: Path,
    results: SweepResults,
    base: str,
    compared: Sequence[GroupComparison],
    confidence: float,
) -> list[Path]:
    """Write sweep_report.csv, .md and .html into `folder`; returns their paths. Raises Fault where it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        folder / "sweep_report.csv": csv_text(results),
        folder / "sweep_report.md": markdown_text(results, base, compared, confidence),
        folder / "sweep_report.html": page_text(results, base, compared, confidence),
    }
    for path, text in texts.items():
        write_atomically(path, text)
    return list(texts)
