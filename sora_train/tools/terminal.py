"""What several sub-commands of `sora` share: kinds of arguments, groups of commands, tables, bars of progress."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

# Overrides must reach the command as they are, even those that look like options.
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
RunArguments = Annotated[list[str] | None, typer.Argument(metavar="[FILE.yaml] [KEY=VALUE]...")]
ScriptArguments = Annotated[
    list[str] | None, typer.Argument(metavar="[FILE.yaml|FILE.py] [KEY=VALUE]...")
]
ConfigDir = Annotated[
    Path | None, typer.Option(help="A folder with config groups and experiments of your own.")
]
ProjectFile = Annotated[
    Path | None,
    typer.Option(
        "--project",
        metavar="FILE.py",
        help="The file that trained a run of your own: its `recipe`.",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="FILE|RUN[:WEIGHT]",
        help="An adapter to add; may be given several times.",
    ),
]
AdapterBase = Annotated[
    str,
    typer.Option("--base", metavar="RUN[@STEP]", help="Where the base of an adapter's run is now."),
]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Take adapters that were trained on another base.")
]
JsonFile = Annotated[
    str,
    typer.Option(
        "--json",
        metavar="[FILE]",
        help="Write it all as JSON; without FILE, or for `-`, print that alone.",
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
RunAtStep = Annotated[
    str, typer.Argument(metavar="RUN[@STEP]", help="A run folder; its newest checkpoint or STEP.")
]


def command_group(text: str) -> typer.Typer:
    """A group of commands with this help, which stays a group even while it has a single command."""
    group = typer.Typer(help=text, add_completion=False, rich_markup_mode=None)
    group.callback()(lambda: None)
    return group


def table_of(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table as text of at most 140 characters a line, without lines between its cells."""
    # Imported here, so that help is instant.
    from rich.table import Table

    from sora_train.base.console import plain_console

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    plain_console(file=text, width=140).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def with_json_file(arguments: Sequence[str]) -> list[str]:
    """The arguments with `-` after a `--json` that no file follows: an option, an override or nothing does."""
    written: list[str] = []
    for number, argument in enumerate(arguments):
        written.append(argument)
        after = arguments[number + 1] if number + 1 < len(arguments) else "--"
        if argument == "--json" and after != "-" and (after.startswith("-") or "=" in after):
            written.append("-")
    return written


def write_json(values: Any, file: str) -> None:
    """Write what `--json` asked for, whole or not at all; print it for `-`."""
    from sora_train.base.files import write_atomically

    text = json.dumps(values, indent=1)
    if file == "-":
        print(text)
    elif file:
        write_atomically(Path(file), text + "\n")


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A `progress(done, total)` that shows a bar from its first call on."""
    from sora_train.base.progress import Progress

    with ExitStack() as stack:
        bars: list[Progress] = []

        def advance(done: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(Progress(total, what)))
            bars[0].update(done)

        yield advance
