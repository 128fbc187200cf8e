"""`sora watch`, `sora report` and `sora track replay`: a run seen from its folder."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sora_train.errors import UserError
from sora_train.tools.terminal import Run, command_group

if TYPE_CHECKING:
    from rich.console import RenderableType

track_app = command_group("Send the metrics and samples of a run to trackers.")


def watch(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of runs.")
    ],
    once: Annotated[
        bool, typer.Option("--once", help="Print once; exit code 1 if a run is in a bad state.")
    ] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two readings.")] = 2.0,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the page as a picture too.")
    ] = None,
) -> int:
    """Watch a run, or a line for each of many: it reads the files in their folders and touches nothing.

    \b
    sora watch runs/mine
    sora watch runs/sweep
    sora watch runs/mine --once
    """
    from rich.live import Live

    from sora_train.base.console import plain_console
    from sora_train.base.files import write_atomically

    if not interval > 0:
        raise UserError(f"--interval {interval:g} must be above 0 seconds")
    page, bad = _current_page(runs)
    console = plain_console(record=svg is not None)
    if once or svg or not console.is_terminal:
        console.print(page)
        if svg is not None:
            write_atomically(svg, console.export_svg(title="sora watch"))
        return int(bad)
    with Live(page, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            time.sleep(interval)
            page, bad = _current_page(runs)
            live.update(page, refresh=True)


def _current_page(runs: list[Path]) -> "tuple[RenderableType, bool]":
    """What to show, and whether a run is in a bad state."""
    from sora_train.monitoring.status import BAD, RunStatus, read_status, runs_in
    from sora_train.tools.watch.view import page, table

    folders = [folder for run in runs for folder in runs_in(run)]
    if len(folders) == 1:
        status = read_status(folders[0])
        return page(status), status.state in BAD
    rows: list[RunStatus | tuple[str, str]] = []
    for folder in folders:
        try:
            rows.append(read_status(folder))
        except UserError as error:
            rows.append((folder.name, str(error)))
    return table(rows), any(isinstance(row, tuple) or row.state in BAD for row in rows)


def report(run_dir: Run) -> None:
    """Write report.html of a run again from the files in its folder.

    \b
    sora report runs/quickstart
    """
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"{run_dir} is no run folder: it has no metrics.jsonl")
    from sora_train.monitoring.report.report import write_report

    print(f"wrote {write_report(run_dir)}")


@track_app.command("replay")
def track_replay(
    run_dir: Run,
    kind: Annotated[
        list[str] | None, typer.Option(help="wandb or tensorboard; by default the run's own.")
    ] = None,
    project: Annotated[str | None, typer.Option(help="W&B project.")] = None,
    mode: Annotated[str, typer.Option(help="W&B: auto, online or offline.")] = "auto",
    new_run: Annotated[
        bool, typer.Option("--new-run", help="Send everything again, into a W&B run of its own.")
    ] = False,
) -> None:
    """Send what a run folder holds and its trackers lack: after an offline run, or one whose tracker failed.

    \b
    sora track replay runs/mine --mode online
    sora track replay runs/mine --kind tensorboard
    """
    from sora_train.monitoring.tracking.feed import replay

    print(replay(run_dir, kind or (), project, mode, new_run=new_run))
