"""The `sora` command. Every sub-command is thin: read the arguments, import what it needs, call it.

What runs from a config takes Hydra overrides (`key=value`); what acts on a thing takes flags, since a prompt with a
comma or a bracket does not survive an override. Heavy imports happen inside the commands, so help is instant.
"""

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.command import bench_app
from sora_train.errors import UserError, run_command
from sora_train.tools.checkpoints.command import TOOLS
from sora_train.tools.config.command import config_app
from sora_train.tools.convert.fetch import fetch
from sora_train.tools.data.command import data_app, prep_app
from sora_train.tools.doctor.command import doctor_app
from sora_train.tools.launch.command import launch_app
from sora_train.tools.plan.command import plan
from sora_train.tools.sample.command import sample
from sora_train.tools.sweep.command import sweep_app
from sora_train.tools.watch.command import watch

# Overrides must reach the command as they are, even those that look like options.
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    help="Train text-to-video diffusion transformers, from clips to samples.\n\n"
    "Start with `sora train experiment=quickstart`, then look at runs/quickstart/report.html.",
    add_completion=False,
    rich_markup_mode=None,
)
ckpt_app = typer.Typer(help="Look at the checkpoints of a run, and make other things of them.")
track_app = typer.Typer(help="Send the metrics and samples of a run to trackers.")
for name, group in {
    "track": track_app,
    "prep": prep_app,
    "data": data_app,
    "ckpt": ckpt_app,
    "config": config_app,
    "bench": bench_app,
    "doctor": doctor_app,
    "launch": launch_app,
    "sweep": sweep_app,
}.items():
    app.add_typer(group, name=name)

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
ConfigDir = Annotated[
    Path | None, typer.Option(help="A folder with config groups and experiments of your own.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_command(lambda: run(sys.argv[1:])))


def run(arguments: Sequence[str]) -> int:
    """Run one `sora` command line; returns its exit code. Raises UserError for a wrong command line."""
    try:
        result = app(list(arguments) or ["--help"], prog_name="sora", standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # Typer has moved its exceptions between releases; what they share is how they tell of themselves.
        explain = getattr(error, "format_message", None)
        if explain is None:
            raise
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "sora"
        raise UserError(f"{' '.join(explain().split()).rstrip('.')}; see `{path} --help`") from None
    return result if isinstance(result, int) else 0


@app.command(context_settings=OVERRIDES)
def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE.yaml|FILE.py] [KEY=VALUE]...")
    ] = None,
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
    if rest and rest[0].endswith(".py") and "=" not in rest[0]:
        return _run_script(Path(rest[0]), rest[1:])
    from sora_train.config import Config
    from sora_train.train import train as train_from_config

    return train_from_config(None, Config, rest)


app.command()(sample)
app.command(context_settings=OVERRIDES)(fetch)
app.command()(watch)
app.command(context_settings=OVERRIDES)(plan)


@ckpt_app.callback()
@track_app.callback()
def _group() -> None:
    """Keeps a group a group even while it has a single command."""


for name, tool in TOOLS.items():
    ckpt_app.command(name)(tool)


@ckpt_app.command("import")
def ckpt_import(
    source: Annotated[
        Path, typer.Argument(metavar="PATH", help="A pipeline's folder, or a transformer's.")
    ],
    out: Annotated[Path, typer.Option(help="The run folder to write.")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="The pipeline of VAE, text encoder and scheduler for a transformer alone."
        ),
    ] = None,
    layout: Annotated[str, typer.Option("--from", help="Layout of PATH: diffusers.")] = "diffusers",
    size: Annotated[str, typer.Option(metavar="WxH", help="Usual size of its clips.")] = "832x480",
    frames: Annotated[int, typer.Option(help="Their usual length in frames.")] = 81,
    fps: Annotated[float, typer.Option(help="Their frames a second.")] = 16.0,
    mask_channel: Annotated[
        bool, typer.Option("--mask-channel", help="Add mask_proj at zero, to train conditioning.")
    ] = False,
    fps_embed: Annotated[
        bool, typer.Option("--fps-embed", help="Add fps_proj at zero, to train on frame rates.")
    ] = False,
) -> None:
    """Make a run folder of open weights in the diffusers layout (Wan 2.1 T2V, Wan 2.2 TI2V).

    Names and shapes are checked on both sides; the model computes what it did.

    \b
    sora ckpt import Wan2.1-T2V-1.3B-Diffusers --out runs/wan
    sora ckpt import my_transformer --base Wan2.1-T2V-1.3B-Diffusers --out runs/mine
    sora sample --ckpt runs/wan --prompt "a dog runs on a beach"
    sora train experiment=real_tiny model=wan_1_3b init.run=runs/wan data.source=my_clips
    """
    from sora_train.tools.terminal import ckpt_import as read

    print(read(source, out, layout, size, frames, fps, mask_channel, fps_embed, base))


@ckpt_app.command("export")
def ckpt_export(
    run_dir: Annotated[str, typer.Argument(metavar="RUN[@STEP]")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    layout: Annotated[
        str, typer.Option("--to", help="Layout of the folder: diffusers.")
    ] = "diffusers",
    live: Annotated[
        bool, typer.Option("--live", help="The weights as trained, not their average.")
    ] = False,
    ema: Annotated[
        str, typer.Option(metavar="TAG", help="Another average, one of ema.more: 0.9999.")
    ] = "ema",
    fps: Annotated[
        float | None, typer.Option(help="Frame rate to fold into a model that is told it.")
    ] = None,
    max_shard_gb: Annotated[float, typer.Option(help="Largest file of weights in GB.")] = 5.0,
) -> None:
    """Write a run as a folder that diffusers' WanPipeline loads and samples from as it is.

    \b
    sora ckpt export runs/mine --out my_pipeline
    sora ckpt export runs/mine@2000 --out my_pipeline --live --fps 16
    """
    from sora_train.tools.terminal import ckpt_export as write

    print(write(run_dir, out, layout, _weights(live, ema), fps, max_shard_gb))


@app.command("models", context_settings=OVERRIDES)
def models(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """List the shipped sizes of the transformer: parameters, and operations of training for each token.

    \b
    sora models
    sora models model.patch_size=[1,4,4]
    """
    from sora_train.tools.terminal import models as table

    print(table(list(arguments or []), config_dir))


@app.command()
def init(name: Annotated[str, typer.Argument(metavar="NAME", help="Folder to create.")]) -> None:
    """Start a project of your own: a train.py of some 15 lines and a my.yaml of about ten.

    \b
    sora init my_project
    sora train my_project/train.py my_project/my.yaml
    """
    from sora_train.tools.config.project import create

    print(create(Path(name)))


@app.command()
def report(run_dir: Run) -> None:
    """Write report.html of a run again from the files in its folder.

    \b
    sora report runs/quickstart
    """
    from sora_train.tools.terminal import write_report

    print(write_report(run_dir))


def _weights(live: bool, ema: str) -> str:
    if live and ema != "ema":
        raise UserError(f"--live and --ema {ema} name two sets of weights; give one of them")
    return "live" if live else ema


@app.command("replay")
def replay_step(
    run_dir: Run,
    step: Annotated[int, typer.Option(help="The step, as metrics.jsonl counts; the first is 1.")],
    rank: Annotated[int | None, typer.Option(help="Only what this rank trained.")] = None,
    of: Annotated[
        int | None, typer.Option(help="Ranks it is dealt out over, if not its own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder; default: RUN/replay/step-N.")] = None,
    no_loss: Annotated[
        bool, typer.Option("--no-loss", help="Without the model: clips and draws alone.")
    ] = False,
    checkpoint: Annotated[
        int | None, typer.Option(help="Weights of this step; 0: those the run began with.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Rebuild a step on one machine: its clips, captions, noise levels, conditioning and the loss of each clip.

    Writes a contact sheet and replay.json; losses are those under the newest checkpoint before the step.

    \b
    sora replay runs/mine --step 1200
    sora replay runs/mine --step 1200 --rank 3
    sora replay runs/mine --step 1200 --no-loss --out look
    """
    from sora_train.tools.replay.replay import Request, replay

    print(replay(Request(run_dir, step, rank, of, out, not no_loss, checkpoint, device)))


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


def _run_script(script: Path, arguments: list[str]) -> int:
    """Run a project's own training file as `python FILE` would."""
    if not script.is_file():
        raise UserError(f"there is no file {script}; `sora init NAME` writes NAME/train.py")
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, os.fspath(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0
