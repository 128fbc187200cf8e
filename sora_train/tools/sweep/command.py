"""The commands of `sora sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sora_train.tools.terminal import command_group

if TYPE_CHECKING:
    from sora_train.tools.sweep.report.report import Table

sweep_app = command_group("What `sora train -m` has found.")


@sweep_app.command("report")
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The sweep's run.dir, or any folder of runs.")
    ],
    metric: Annotated[
        str, typer.Option(help="What to compare by; the validation loss, or what was searched for.")
    ] = "",
    baseline: Annotated[
        str, typer.Option(metavar="ID", help="The run that others are compared with; the best.")
    ] = "",
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where to write; the sweep's folder.")
    ] = None,
) -> None:
    """A table of the runs, their paired differences, and a page with curves: sweep_report.csv, .md and .html.

    \b
    sora sweep report runs/rates
    sora sweep report runs/rates --metric train/loss --baseline optim.lr=1e-4,seed=0
    """
    from rich.console import Console

    from sora_train.base.files import write_atomically
    from sora_train.tools.sweep.report.compare import compare
    from sora_train.tools.sweep.report.report import (
        compared_table,
        default_paths,
        following,
        notes,
        runs_table,
        written,
    )
    from sora_train.tools.sweep.report.rows import collect

    results = collect(folder, metric)
    base, compared = compare(results, baseline, confidence)
    console = Console()
    show(console, "Runs", runs_table(results))
    if compared:
        show(console, f"Against {base}", compared_table(compared, confidence))
    for sentence in notes(results, base, compared):
        console.print(sentence, highlight=False)
    paths = default_paths(out or folder)
    paths["csv"].parent.mkdir(parents=True, exist_ok=True)
    for ending, text in written(results, base, compared, confidence).items():
        write_atomically(paths[ending], text)
    console.print(
        f"written: {', '.join(map(str, paths.values()))}", highlight=False, soft_wrap=True
    )
    for command in following(results):
        console.print(f"next: {command}", highlight=False, soft_wrap=True)


def show(console: object, title: str, table: "Table") -> None:
    from rich.console import Console
    from rich.table import Table as Drawn

    assert isinstance(console, Console)
    heads, rows = table
    drawn = Drawn(title=title, title_justify="left")
    for head in heads:
        drawn.add_column(head, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    console.print(drawn)
