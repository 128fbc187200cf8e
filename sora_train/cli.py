"""The `sora` command: it assembles the sub-commands, whose flags and help are in `tools/<verb>/command.py`.

What runs from a config takes Hydra overrides (`key=value`); what acts on a thing takes flags, since a prompt with a
comma or a bracket does not survive an override. Heavy imports happen inside the commands, so help is instant.
"""

import os
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from sora_train.errors import UserError, run_command
from sora_train.tools.checkpoints import command as checkpoints
from sora_train.tools.config.command import config_app, init
from sora_train.tools.convert import command as convert
from sora_train.tools.data.command import data_app
from sora_train.tools.data.prep import prep_app
from sora_train.tools.doctor.command import doctor_app
from sora_train.tools.doctor.replay.command import replay
from sora_train.tools.eval.command import evaluate
from sora_train.tools.launch.command import launch_app
from sora_train.tools.plan.command import models, plan
from sora_train.tools.sample.command import sample
from sora_train.tools.serve.command import serve_app
from sora_train.tools.serve.verify import verify
from sora_train.tools.sweep.ab.command import ab
from sora_train.tools.sweep.command import sweep_app
from sora_train.tools.terminal import (
    OVERRIDES,
    ConfigDir,
    Overrides,
    RunAtStep,
    ScriptArguments,
    command_group,
    with_json_file,
)
from sora_train.tools.watch.command import report, track_app, watch

REPOSITORY = Path(__file__).resolve().parents[1]
"""The checkout this package runs from, if it does; the folder of installed packages otherwise."""

app = typer.Typer(
    help="Train text-to-video diffusion transformers, from clips to samples.\n\n"
    "Start with `sora train experiment=quickstart`, then look at runs/quickstart/report.html.",
    add_completion=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_command(lambda: run(sys.argv[1:])))


def run(arguments: Sequence[str]) -> int:
    """Run one `sora` command line; returns its exit code. Raises UserError for a wrong command line."""
    try:
        result = app(
            with_json_file(arguments) or ["--help"], prog_name="sora", standalone_mode=False
        )
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # Typer has moved its exceptions between releases; all of them have format_message.
        explain = getattr(error, "format_message", None)
        if explain is None:
            raise
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "sora"
        raise UserError(f"{' '.join(explain().split()).rstrip('.')}; see `{path} --help`") from None
    return result if isinstance(result, int) else 0


@app.command(context_settings=OVERRIDES)
def train(
    arguments: ScriptArguments = None,
    config_dir: ConfigDir = None,
    multirun: Annotated[
        bool, typer.Option("-m", "--multirun", help="One run for each combination of a=1,2.")
    ] = False,
) -> int:
    """Train from a config: a shipped experiment, a YAML file or a project of your own.

    \b
    sora train experiment=quickstart
    sora train experiment=real_tiny data.source=my_clips run.dir=runs/mine
    sora train my.yaml train.steps=2000
    sora train my_project/train.py optim.lr=3e-4
    sora train -m experiment=quickstart seed=0,1,2
    sora train experiment=quickstart dry_run=true
    """
    rest = list(arguments or [])
    if config_dir is not None:
        rest += ["--config-dir", str(config_dir)]
    if multirun:
        rest.append("-m")
    from sora_train.config.job import split_script

    script, rest = split_script(rest)
    if script is not None:
        return _run_script(script, rest)
    from sora_train.config import Config
    from sora_train.train import train as train_from_config

    return train_from_config(None, Config, rest)


@app.command(context_settings=OVERRIDES)
def distill(run: RunAtStep, arguments: Overrides = None) -> int:
    """Distill a trained run, so that its clips take 4 steps without guidance in place of 50 guided ones.

    A run like any other comes of it, in RUN-distilled, sampled as any other; called again it goes on where it stopped.

    \b
    sora distill runs/quickstart
    sora distill runs/quickstart@700 run.dir=runs/fast objective.num_steps=2 train.steps=500
    sora sample --ckpt runs/quickstart-distilled --prompt "red circle moves left"
    """
    from sora_train.config import Config
    from sora_train.tools.launch.distillation import training_arguments
    from sora_train.train import train as train_from_config

    return train_from_config(None, Config, training_arguments(run, arguments or []))


def _run_script(script: Path, arguments: list[str]) -> int:
    """Run a project's own training file as `python FILE` would."""
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, os.fspath(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0


def bench(arguments: Annotated[list[str] | None, typer.Argument(metavar="NAME ...")] = None) -> int:
    """Measure on this machine, beside peers: `sora bench --help` lists the benchmarks of a checkout."""
    rest = list(arguments or ["--help"])
    if (REPOSITORY / "benchmarks" / "command.py").is_file():
        # Before any other folder, which may have `benchmarks` of its own.
        sys.path.insert(0, os.fspath(REPOSITORY))
        bench_app = import_module("benchmarks.command").bench_app
        return bench_app(rest, prog_name="sora bench", standalone_mode=False) or 0
    if rest[0] == "cost":
        from sora_train.tools.plan.cost import main as bench_cost

        return bench_cost(rest[1:])
    raise UserError(
        f"`sora bench {rest[0]}` is not in the installed package, which has `sora bench cost` alone; the other "
        "benchmarks are in the repository of sora_train: clone it, and run `sora bench` from its environment"
    )


app.command()(sample)
app.command(context_settings=OVERRIDES)(ab)
app.command("eval")(evaluate)
app.command(context_settings=OVERRIDES)(convert.fetch)
app.command()(watch)
app.command(context_settings=OVERRIDES)(plan)
app.command(context_settings=OVERRIDES)(models)
app.command()(init)
app.command()(report)
app.command()(replay)
app.command()(verify)
# --help must reach the benchmarks.
app.command(context_settings={**OVERRIDES, "help_option_names": []})(bench)

ckpt_app = command_group("Look at the checkpoints of a run, and make other things of them.")
for name, command in {**checkpoints.CHECKPOINT_COMMANDS, **convert.CHECKPOINT_COMMANDS}.items():
    ckpt_app.command(name)(command)

for name, group in {
    "track": track_app,
    "prep": prep_app,
    "data": data_app,
    "ckpt": ckpt_app,
    "config": config_app,
    "doctor": doctor_app,
    "launch": launch_app,
    "sweep": sweep_app,
    "serve": serve_app,
}.items():
    app.add_typer(group, name=name)
