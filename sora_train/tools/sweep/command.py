"""The commands of `sora sweep`."""

from pathlib import Path
from typing import Annotated

import typer

from sora_train.tools.terminal import command_group

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
    from sora_train.tools.sweep.report.compare import compare
    from sora_train.tools.sweep.report.report import next_commands, print_report, write_report
    from sora_train.tools.sweep.report.rows import collect

    results = collect(folder, metric)
    base, compared = compare(results, baseline, confidence)
    print_report(results, base, compared, confidence)
    paths = write_report(out or folder, results, base, compared, confidence)
    print(f"written: {', '.join(map(str, paths))}")
    for command in next_commands(results):
        print(f"next: {command}")
