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

from sora_train.ckpt_command import TOOLS
from sora_train.doctor_command import doctor_app
from sora_train.errors import UserError, run_command
from sora_train.sample_command import sample

# Overrides must reach the command as they are, even those that look like options.
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    help="Train text-to-video diffusion transformers, from clips to samples.\n\n"
    "Start with `sora train experiment=quickstart`, then look at runs/quickstart/report.html.",
    add_completion=False,
    rich_markup_mode=None,
)
prep_app = typer.Typer(help="Turn raw clips into what training reads fastest.")
data_app = typer.Typer(help="Look at a source of clips the way training sees it.")
ckpt_app = typer.Typer(help="Look at the checkpoints of a run, and make other things of them.")
config_app = typer.Typer(help="Values, where they come from, and what they mean.")
bench_app = typer.Typer(help="Measure; every number goes with its machine and commit.")
track_app = typer.Typer(help="Send the metrics and samples of a run to trackers.")
for name, group in {
    "track": track_app,
    "prep": prep_app,
    "data": data_app,
    "ckpt": ckpt_app,
    "config": config_app,
    "bench": bench_app,
    "doctor": doctor_app,
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


@prep_app.callback()
@data_app.callback()
@ckpt_app.callback()
@config_app.callback()
@bench_app.callback()
@track_app.callback()
def _group() -> None:
    """Keeps a group a group even while it has a single command."""


@prep_app.command("shards", context_settings=OVERRIDES)
def prep_shards(settings: Overrides = None) -> None:
    """Write webdataset tars and a Parquet manifest from a folder of clips and images.

    \b
    sora prep shards input=my_clips captions=my_clips/captions.jsonl output=shards
    sora prep shards input=my_clips output=shards        (a .txt beside each clip)
    """
    from sora_train.commands import prep_shards as write

    print(write(list(settings or [])))


@data_app.command("index", context_settings=OVERRIDES)
def data_index(settings: Overrides = None) -> None:
    """Index a source in place and print how many clips it has and which are dropped, with reasons.

    \b
    sora data index source=my_clips
    sora data index source=table.csv captions=captions.jsonl
    sora data index source=s3://bucket/shard-{000..010}.tar output=my_index probe=header workers=16
    sora data index source=my_tars output=my_index video_key=mp4 caption_keys=[json:caption.long,txt]
    sora data index source=my_tars output=my_index part=1/4       (then the same with merge=true)
    """
    from sora_train.commands import data_index as index

    print(index(list(settings or [])))


@data_app.command("show", context_settings=OVERRIDES)
def data_show(settings: Overrides = None) -> None:
    """List the clips of a source: frames, size, frame rate, caption.

    \b
    sora data show source=shards limit=20
    """
    from sora_train.commands import data_show as show

    print(show(list(settings or [])))


@data_app.command("report", context_settings=OVERRIDES)
def data_report(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Write a page and a picture of what a run would make of its clips: frames, buckets, drops, captions.

    Overrides are those of a run; out=DIR says where the files go.

    \b
    sora data report experiment=quickstart
    sora data report experiment=real_tiny data.source=my_clips out=my_report
    """
    from sora_train.commands import data_report as report

    print(report(list(arguments or []), config_dir))


@data_app.command("trace", context_settings=OVERRIDES)
def data_trace(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Print which clips each rank would train on in which step, a JSON row a micro-batch; no clip is decoded.

    Overrides are those of a run; steps=A:B (B excluded), world=R ranks and out=FILE.jsonl are this command's own.

    \b
    sora data trace experiment=quickstart steps=0:4 world=2
    sora data trace experiment=real_tiny data.source=my_clips steps=100:200 world=8 out=trace.jsonl
    """
    from sora_train.commands import data_trace as trace

    print(trace(list(arguments or []), config_dir))


@data_app.command("encode", context_settings=OVERRIDES)
def data_encode(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Write shards of a run's clips as latents (and caption embeddings where the text encoder is frozen).

    Overrides are those of a run; output=DIR, keep_clips=true, dtype=float32|bfloat16|float16 and max_shard_mb= are
    this command's own, and source= is data.source=. The clips go to DIR/train, held-out ones to DIR/val. Ranks of
    torchrun share the encoding, as do parts; what was cut off goes on with the same command.

    \b
    sora data encode experiment=real_tiny source=my_clips output=encoded dtype=bfloat16
    sora data encode experiment=real_tiny source=my_clips output=encoded part=1/4  (then the same with merge=true)
    sora train experiment=real_tiny data.source=encoded/train data.val_source=encoded/val
    """
    from sora_train.commands import data_encode as encode

    print(encode(list(arguments or []), config_dir))


@data_app.command("verify", context_settings=OVERRIDES)
def data_verify(arguments: Overrides = None, config_dir: ConfigDir = None) -> int:
    """Encode a sample of the stored latents and caption embeddings again; exit 1 with a list where they differ.

    Overrides are those of the run whose cache is looked at; sample=SHARE% or a number of clips, and encoded=DIR (the
    output of `sora data encode`, looked at instead of the cache) are this command's own.

    \b
    sora data verify experiment=real_tiny data.source=my_clips data.cache_dir=latents sample=0.1%
    sora data verify experiment=real_tiny source=my_clips encoded=encoded sample=20
    """
    from sora_train.commands import data_verify as verify

    text, same = verify(list(arguments or []), config_dir)
    print(text)
    return 0 if same else 1


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
    from sora_train.commands import ckpt_import as read

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
    from sora_train.commands import ckpt_export as write

    print(write(run_dir, out, layout, _weights(live, ema), fps, max_shard_gb))


@config_app.command("show", context_settings=OVERRIDES)
def config_show(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Print the whole configuration of a command line as YAML, with the origin of each chosen value.

    \b
    sora config show experiment=quickstart train.steps=50
    sora config show my.yaml
    """
    from sora_train.config.compose import compose, split_yaml_file
    from sora_train.config.explain import show

    yaml_file, overrides = split_yaml_file(list(arguments or []))
    print(show(compose(overrides, config_dir=config_dir, yaml_file=yaml_file)), end="")


@config_app.command("diff")
def config_diff(
    left: Annotated[str, typer.Argument(metavar="A")],
    right: Annotated[str, typer.Argument(metavar="B")],
) -> None:
    """Print the keys in which two configurations differ: run folders, config.yaml files or experiment=NAME.

    \b
    sora config diff runs/a runs/b
    sora config diff runs/a experiment=quickstart
    """
    from sora_train.config.explain import diff

    print(diff(left, right), end="")


@config_app.command("explain", context_settings=OVERRIDES)
def config_explain(
    key: Annotated[str, typer.Argument(metavar="KEY")],
    arguments: Overrides = None,
    config_dir: ConfigDir = None,
) -> None:
    """Explain a key, a section or a group; overrides after it tell of which run.

    \b
    sora config explain data.cache
    sora config explain model
    sora config explain optim.lr experiment=quickstart
    """
    from sora_train.config.compose import compose, split_yaml_file
    from sora_train.config.explain import explain

    yaml_file, overrides = split_yaml_file(list(arguments or []))
    print(explain(key, compose(overrides, config_dir=config_dir, yaml_file=yaml_file)), end="")


@bench_app.command("train", context_settings=OVERRIDES)
def bench_train(arguments: Overrides = None) -> int:
    """Measure training steps: warm-up, then median and spread, as JSON and Markdown.

    Overrides choose what is trained; --steps N and --warmup N how much of it is measured, --out DIR where the
    results go.

    \b
    sora bench train experiment=quickstart --steps 30 --warmup 5 --out benchmarks/results
    """
    from sora_train.commands import bench_train as bench

    return bench(list(arguments or []))


@bench_app.command("data", context_settings=OVERRIDES)
def bench_data(arguments: Overrides = None) -> int:
    """Measure the loader beside the bare decoder and plain webdataset, on the same clips and processes.

    Overrides choose the clips and the loader; --clips N and --repeats N how much is measured, --soak N over how many
    clips memory is watched, --out DIR where the results go.

    \b
    sora bench data experiment=quickstart --clips 500 --soak 5000
    sora bench data experiment=real_tiny data.source=shards buckets=256px --clips 60
    """
    from sora_train.commands import bench_data as bench

    return bench(list(arguments or []))


@bench_app.command("cost", context_settings=OVERRIDES)
def bench_cost(arguments: Overrides = None) -> int:
    """Measure forward and backward at several clip lengths and fit what a clip costs: a * S + b * S^2.

    Micro-batches are sized and dealt out by that cost. By default it comes from the model's FLOPs; what a machine
    really takes differs with kernels and sizes, so measure on the machine that trains and paste the two values that
    are printed. Overrides choose the model; tokens=A,B,C the tokens of the clips measured (three or more; by default
    up to the largest bucket's or data.micro_batch_tokens), --repeats N how often, --out DIR where the results go.

    \b
    sora bench cost experiment=quickstart
    sora bench cost experiment=real_tiny buckets=256px tokens=1000,2000,4000,8000 --repeats 10
    sora train experiment=quickstart data.cost_a=1.1e-4 data.cost_b=2.3e-8         (the values it printed)
    """
    from sora_train.commands import bench_cost as bench

    return bench(list(arguments or []))


@bench_app.command("model", context_settings=OVERRIDES)
def bench_model(arguments: Overrides = None) -> int:
    """Measure forward and backward of the transformer beside diffusers' on the same weights, shape and dtype.

    Overrides are those of the section model; --tokens N the clip's length, --dtype float32,bfloat16 and --modes
    eager,dynamic,static what is measured, --repeats N how often, --out DIR where the results go.

    \b
    sora bench model --tokens 1024 --repeats 3
    sora bench model model=wan_1_3b model.attention=flash --tokens 8192 --dtype bfloat16 --device cuda
    """
    from sora_train.commands import bench_model as bench

    return bench(list(arguments or []))


@bench_app.command("memory", context_settings=OVERRIDES)
def bench_memory(arguments: Overrides = None) -> int:
    """Measure what each memory option saves and costs: bytes, seconds, and with --longest how long a clip fits.

    Overrides are those of the section model; --tokens N the clip's length, --options "full;offload" which ones,
    --budget-mib M the memory that --longest may count on a CPU, --out DIR where the results go.

    \b
    sora bench memory --tokens 512 --device cpu
    sora bench memory model=wan_1_3b --tokens 16384 --longest --device cuda
    """
    from sora_train.commands import bench_memory as bench

    return bench(list(arguments or []))


@bench_app.command("ckpt", context_settings=OVERRIDES)
def bench_ckpt(arguments: Overrides = None) -> int:
    """Save one state at once and behind the training, in turns: how long the training waits for each.

    --mib N the size of the state, --repeats N how often, --device cuda where it lies, --folder DIR the disk, --out DIR
    where the results go.

    \b
    sora bench ckpt --mib 1024 --repeats 5
    """
    from sora_train.commands import bench_ckpt as bench

    return bench(list(arguments or []))


@bench_app.command("vae", context_settings=OVERRIDES)
def bench_vae(arguments: Overrides = None) -> int:
    """Encode and decode held-out clips: PSNR and SSIM beside the compression ratio, frames a second.

    Overrides choose the VAE and the clips; --clips N how many at most, --out DIR where the results go.

    \b
    sora bench vae experiment=quickstart
    sora bench vae experiment=real_tiny data.source=clips vae.path=weights/wan2.1 --clips 8
    """
    from sora_train.commands import bench_vae as bench

    return bench(list(arguments or []))


@app.command("models", context_settings=OVERRIDES)
def models(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """List the shipped sizes of the transformer: parameters, and operations of training for each token.

    \b
    sora models
    sora models model.patch_size=[1,4,4]
    """
    from sora_train.commands import models as table

    print(table(list(arguments or []), config_dir))


@app.command()
def init(name: Annotated[str, typer.Argument(metavar="NAME", help="Folder to create.")]) -> None:
    """Start a project of your own: a train.py of some 15 lines and a my.yaml of about ten.

    \b
    sora init my_project
    sora train my_project/train.py my_project/my.yaml
    """
    from sora_train.project import create

    print(create(Path(name)))


@app.command()
def report(run_dir: Run) -> None:
    """Write report.html of a run again from the files in its folder.

    \b
    sora report runs/quickstart
    """
    from sora_train.commands import write_report

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
    from sora_train.replay_command import Request, replay

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
    from sora_train.tracking_feed import replay

    print(replay(run_dir, kind or (), project, mode, new_run=new_run))


def _run_script(script: Path, arguments: list[str]) -> int:
    """Run a project's own training file as `python FILE` would."""
    if not script.is_file():
        raise UserError(f"there is no file {script}; `sora init NAME` writes NAME/train.py")
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, os.fspath(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0
