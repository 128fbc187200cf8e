"""The commands of `sora doctor`: whether these nodes are fit for a run, and train the same numbers in every layout."""

from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from sora_train.tools.terminal import OVERRIDES, ConfigDir, JsonFile, Overrides, RunArguments

EXAMINE = "examine"


class Doctor(TyperGroup):
    """Without a command of its own `sora doctor ...` is `sora doctor examine ...`."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = [EXAMINE, *args]
        return super().parse_args(ctx, args)


doctor_app = typer.Typer(
    cls=Doctor,
    help="Whether these nodes are fit for a run (`sora doctor`, alone or under torchrun), and train the same numbers "
    "in every layout.",
)


@doctor_app.command(EXAMINE, context_settings=OVERRIDES)
def examine(
    arguments: RunArguments = None,
    config_dir: ConfigDir = None,
    json_file: JsonFile = "",
    name: Annotated[str, typer.Option(help="What to call this node; default: its host name.")] = "",
    seconds: Annotated[float, typer.Option(help="The whole takes no longer than this.")] = 110.0,
    no_bandwidth: Annotated[
        bool, typer.Option("--no-bandwidth", help="Without measuring what ranks exchange.")
    ] = False,
) -> int:
    """Look at this machine, or under torchrun at all nodes, before a run: exit 1 where something would fail.

    \b
    sora doctor
    sora doctor experiment=quickstart --json doctor.json
    torchrun --nnodes 4 --nproc-per-node 8 ... -m sora_train doctor experiment=quickstart
    """
    from sora_train.tools.doctor.start import start

    rest = [*(arguments or []), *(["--config-dir", str(config_dir)] if config_dir else [])]
    return start(rest, json_file, name, seconds, bandwidth=not no_bandwidth)


@doctor_app.command("parallel", context_settings=OVERRIDES)
def parallel(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Take one step of a tiny model in a run's layout and compare it with one process; under torchrun or alone.

    \b
    sora doctor parallel experiment=quickstart
    torchrun --nproc-per-node=4 -m sora_train doctor parallel parallel.dp_shard=2 parallel.ulysses=2
    """
    from sora_train.tools.doctor.parity.one_layout import check_layout

    result = check_layout(list(arguments or []), config_dir)
    if result:
        print(result)


@doctor_app.command("parity")
def parity(
    layouts: Annotated[str, typer.Option(help="Layouts, by comma; all where none is named.")] = "",
    accumulations: Annotated[
        str, typer.Option(help="Micro-batches of each rank in a step, by comma.")
    ] = "1,3",
    optimizers: Annotated[
        str, typer.Option(help="Of sgd, adamw, muon and schedule_free, any.")
    ] = "sgd,adamw",
    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float64, float32 or bfloat16; auto: float64 (ZeRO: float32), and once bfloat16."
        ),
    ] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the table to this file as well.")] = None,
) -> int:
    """Train a tiny model in every layout and compare losses, norms, weights and bytes sent; exit 1 where they differ.

    \b
    sora doctor parity
    sora doctor parity --layouts "fsdp x2,ring 2" --dtype bfloat16
    sora doctor parity --out docs/parity.md
    """
    from sora_train.tools.doctor.parity.parity import MatrixSelection, parity

    named = {"layouts": layouts, "accumulations": accumulations, "optimizers": optimizers}
    usual = {"layouts": "", "accumulations": "1,3", "optimizers": "sgd,adamw"}
    options = [f'--{name} "{value}"' for name, value in named.items() if value != usual[name]]
    options += [f"--dtype {dtype}"] if dtype != "auto" else []
    options += [f"--out {out}"] if out else []
    lists = {
        name: tuple(part.strip() for part in value.split(",") if part.strip())
        for name, value in named.items()
    }
    selection = MatrixSelection(**lists, dtype=dtype)
    return 0 if parity(selection, out, command=" ".join(["sora doctor parity", *options])) else 1
