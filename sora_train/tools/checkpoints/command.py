"""The commands of `sora ckpt` that look at checkpoints, compare, average and remove them: their flags and help."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from sora_train.errors import UserError
from sora_train.tools.terminal import AdapterBase, Adapters, AnyBase, Run, RunAtStep, table_of


def ls(run_dir: Run) -> None:
    """List the checkpoints of a run: step, size, age, samples seen, validation loss, and whether each is whole.

    An incomplete one is listed with what is wrong with it; training goes on from the newest complete one.

    \b
    sora ckpt ls runs/quickstart
    """
    from sora_train.tools.checkpoints.inspect import LS_COLUMNS
    from sora_train.tools.checkpoints.inspect import ls as listing

    rows, total = listing(run_dir)
    print(f"{table_of(LS_COLUMNS, rows)}\n{total}")


def inspect(
    ckpt: RunAtStep,
    tensors: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="List the tensors whose name holds or matches it."),
    ] = None,
) -> None:
    """Show what a checkpoint holds: step, spec, digests, versions, config in short, groups of tensors.

    --tensors lists single ones with mean, spread, range and how many values are not finite. PATTERN is a part of the
    name or has wildcards; names are model.*, optim.* and ema.*, one tensor is in memory at a time.

    \b
    sora ckpt inspect runs/quickstart
    sora ckpt inspect runs/quickstart@600 --tensors "model.*.bias"
    sora ckpt inspect runs/quickstart --tensors exp_avg_sq
    """
    from sora_train.checkpoint import find
    from sora_train.checkpoint.layout import split_step
    from sora_train.checkpoint.tensors import StoredTensors
    from sora_train.tools.checkpoints import inspect as tools

    checkpoint = find(*split_step(ckpt))
    stored = StoredTensors(checkpoint)
    if tensors is not None:
        print(table_of(tools.TENSOR_COLUMNS, tools.tensor_rows(stored, tensors)))
        return
    print(table_of(("what", "value"), tools.facts(checkpoint)))
    print(f"\n{table_of(tools.GROUP_COLUMNS, tools.groups(stored))}")


def verify(ckpt: RunAtStep) -> None:
    """Read every file of a run's checkpoints, or of one, and compare it with its digest; exit 1 names a damaged one.

    \b
    sora ckpt verify runs/quickstart
    sora ckpt verify runs/quickstart@600
    """
    from sora_train.checkpoint.layout import split_step
    from sora_train.tools.checkpoints.inspect import verify as check

    print(check(*split_step(ckpt)))


def diff(
    one: Annotated[str, typer.Argument(metavar="A", help="RUN or RUN@STEP.")],
    other: Annotated[str, typer.Argument(metavar="B", help="RUN or RUN@STEP.")],
    tensors: Annotated[
        str, typer.Option(metavar="PART", help="Compare only tensors whose name holds it.")
    ] = "",
    limit: Annotated[int, typer.Option(min=1, help="Rows of tensors shown at most.")] = 20,
) -> None:
    """Compare two checkpoints: state and config keys that differ, tensors only one has, and how far weights moved.

    Of each tensor in both: the largest difference of two values, the L2 norm of the difference over that of A's, and
    the share of values that moved, farthest apart first. Two tensors are in memory at a time.

    \b
    sora ckpt diff runs/quickstart@500 runs/quickstart
    sora ckpt diff runs/a runs/b --tensors model. --limit 50
    """
    from sora_train.checkpoint import find
    from sora_train.checkpoint.layout import split_step
    from sora_train.checkpoint.tensors import StoredTensors
    from sora_train.tools.checkpoints import diff as checkpoint_diff

    first, second = find(*split_step(one)), find(*split_step(other))
    rows = checkpoint_diff.state_rows(first, second)
    if rows:
        print(table_of(("key", one, other), rows), end="\n\n")
    ours, theirs = StoredTensors(first), StoredTensors(second)
    lists = {
        f"only in {one}": checkpoint_diff.only_in(ours, theirs),
        f"only in {other}": checkpoint_diff.only_in(theirs, ours),
        "of another shape": checkpoint_diff.reshaped(ours, theirs),
    }
    for what, names in lists.items():
        if names:
            more = f" and {len(names) - limit} more" if len(names) > limit else ""
            print(f"{len(names)} tensors {what}: {', '.join(names[:limit])}{more}\n")
    compared = checkpoint_diff.tensor_differences(ours, theirs, tensors)
    moved = [row for row in compared if row.moved]
    if moved:
        shown = checkpoint_diff.rows(moved[:limit])
        print(table_of(checkpoint_diff.TENSOR_COLUMNS, shown))
    if len(moved) > limit:
        print(f"{len(moved) - limit} more; raise --limit")
    print(
        f"{len(compared)} tensors compared, {len(compared) - len(moved)} of them the same bit for bit"
    )


def average(
    sources: Annotated[
        list[str], typer.Argument(metavar="RUN[@STEP]...", help="What is averaged.")
    ],
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="How much each counts; all alike if left out."),
    ] = None,
    sigma_rel: Annotated[
        float | None,
        typer.Option(
            "--sigma-rel", help="Width of a post-hoc average of one run with ema.post_hoc."
        ),
    ] = None,
) -> None:
    """Average the weights of checkpoints into a run folder of their own, which samples like any other.

    Several checkpoints: their mean, live weights and averages each among themselves. One run and --sigma-rel: the
    average of that width over all of its training, made of the snapshots of ema.post_hoc (docs/averaging.md).

    \b
    sora ckpt average runs/mine@8000 runs/mine@9000 runs/mine --out runs/mean
    sora ckpt average runs/a runs/b --weights 3,1 --out runs/mixed
    sora ckpt average runs/mine --sigma-rel 0.12 --out runs/wider
    sora sample --ckpt runs/wider --prompt "..."
    """
    from sora_train.checkpoint import find
    from sora_train.checkpoint.layout import split_step
    from sora_train.tools.checkpoints.averaging import average_checkpoints, average_post_hoc

    if sigma_rel is None:
        checkpoints = [find(*split_step(source)) for source in sources]
        print(average_checkpoints(checkpoints, _numbers(weights), out))
        return
    if len(sources) != 1 or weights is not None:
        raise UserError(
            f"--sigma-rel {sigma_rel:g} makes an average of one run's snapshots; give one RUN[@STEP] and no --weights"
        )
    run_dir, step = split_step(sources[0])
    print(average_post_hoc(run_dir, step, sigma_rel, out))


def merge(
    ckpt: RunAtStep,
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    adapter: Adapters = None,
    base: AdapterBase = "",
    any_base: AnyBase = False,
    live: Annotated[
        bool, typer.Option("--live", help="The weights as trained, not their average.")
    ] = False,
) -> None:
    """Merge adapters into the weights of a run, in float32, and write a run folder that needs no adapter any more.

    RUN may be an adapter's own: its base and its adapter are merged, and those given too. The result samples, exports
    and is started from (init.run) like imported weights.

    \b
    sora ckpt merge runs/zork --out runs/zork_whole
    sora ckpt merge runs/wan --adapter zork.safetensors:0.8 --adapter runs/style --out runs/both
    """
    from sora_train.checkpoint.layout import split_step
    from sora_train.tools.checkpoints.merging import merge_adapters

    folder, step = split_step(ckpt)
    weights = "live" if live else "ema"
    print(merge_adapters(folder, step, adapter or [], out, weights, base=base, any_base=any_base))


def prune(
    run_dir: Run,
    keep_last: Annotated[int, typer.Option("--keep-last", help="Newest checkpoints kept.")],
    keep_every: Annotated[
        int, typer.Option("--keep-every", help="Also keep those of steps it divides.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be removed, remove nothing.")
    ] = False,
) -> None:
    """Remove old checkpoints of a run that is over, and what torn saves have left; says what that frees.

    The newest complete checkpoint always stays. A live run is refused: it keeps order by checkpoint.keep_last.

    \b
    sora ckpt prune runs/quickstart --keep-last 1 --dry-run
    sora ckpt prune runs/mine --keep-last 2 --keep-every 10000
    """
    from sora_train.tools.checkpoints.inspect import prune as remove

    print(remove(run_dir, keep_last, keep_every, dry_run=dry_run))


CHECKPOINT_COMMANDS: dict[str, Callable[..., None]] = {
    "ls": ls,
    "inspect": inspect,
    "verify": verify,
    "diff": diff,
    "average": average,
    "merge": merge,
    "prune": prune,
}
"""Those of `sora ckpt`, in the order of the help."""


def _numbers(text: str | None) -> list[float]:
    """W,W,... -> numbers."""
    try:
        return [] if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--weights is '{text}'; write a number for each checkpoint, such as 3,1"
        ) from None
