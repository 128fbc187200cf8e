"""`sora watch RUN`: a live view of runs in the terminal, from their folders alone."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType


def watch(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of runs.")
    ],
    once: Annotated[
        bool, typer.Option("--once", help="Print one look; exit code 1 if a run is in a bad state.")
    ] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 2.0,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the look as a picture too.")
    ] = None,
) -> int:
    """Watch a run, or a line for each of many: it reads the files in their folders and touches nothing.

    \b
    sora watch runs/mine
    sora watch runs/sweep
    sora watch runs/mine --once
    """
    from rich.console import Console
    from rich.live import Live

    from sora_train.base.files import write_atomically
    from sora_train.errors import UserError

    if not interval > 0:
        raise UserError(f"--interval {interval:g} must be above 0 seconds")
    page, bad = _look(runs)
    console = Console(record=svg is not None)
    if once or svg or not console.is_terminal:
        console.print(page)
        if svg is not None:
            write_atomically(svg, console.export_svg(title="sora watch"))
        return int(bad)
    with Live(page, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            time.sleep(interval)
            page, bad = _look(runs)
            live.update(page, refresh=True)


def _look(runs: list[Path]) -> "tuple[RenderableType, bool]":
    """What to show, and whether a run is in a bad state."""
    from sora_train.errors import UserError
    from sora_train.monitoring.status import BAD, Look, look, runs_in
    from sora_train.tools.watch.view import page, table

    folders = [folder for run in runs for folder in runs_in(run)]
    if len(folders) == 1:
        found = look(folders[0])
        return page(found), found.state in BAD
    looks: list[Look | tuple[str, str]] = []
    for folder in folders:
        try:
            looks.append(look(folder))
        except UserError as error:
            looks.append((folder.name, str(error)))
    return table(looks), any(isinstance(one, tuple) or one.state in BAD for one in looks)
