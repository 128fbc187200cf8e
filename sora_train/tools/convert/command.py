"""`sora ckpt import`, `sora ckpt export` and `sora fetch`: models of other layouts, and weights from the hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sora_train.errors import UserError
from sora_train.tools.terminal import ConfigDir, RunArguments

Expert = Annotated[
    str,
    typer.Option(help="Of two transformers (Wan 2.2 A14B): high, low or both; both if left out."),
]
Boundary = Annotated[
    float | None,
    typer.Option(help="Noise level at which they meet; that of the pipeline if left out."),
]
OtherExpert = Annotated[
    str,
    typer.Option(metavar="RUN", help="The run of the other expert, where RUN holds one of two."),
]


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
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Usual size of its clips; by its card if left out."),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Their usual length in frames.")] = None,
    fps: Annotated[float | None, typer.Option(help="Their frames a second.")] = None,
    mask_channel: Annotated[
        bool, typer.Option("--mask-channel", help="Add mask_proj at zero, to train conditioning.")
    ] = False,
    fps_embed: Annotated[
        bool, typer.Option("--fps-embed", help="Add fps_proj at zero, to train on frame rates.")
    ] = False,
    expert: Expert = "",
    boundary: Boundary = None,
) -> None:
    """Make a run folder of open weights in the diffusers layout (Wan 2.1 and 2.2).

    Names and shapes are checked on both sides; the model computes what it did.

    \b
    sora ckpt import Wan2.1-T2V-1.3B-Diffusers --out runs/wan
    sora ckpt import my_transformer --base Wan2.1-T2V-1.3B-Diffusers --out runs/mine
    sora ckpt import Wan2.2-T2V-A14B-Diffusers --expert high --out runs/wan_high
    sora sample --ckpt runs/wan --prompt "a dog runs on a beach"
    sora train experiment=real_tiny model=wan_1_3b init.run=runs/wan data.source=my_clips
    """
    _require_diffusers("--from", layout)
    from sora_train.sampling.pipeline import ClipShape
    from sora_train.tools.convert.from_diffusers import import_pipeline, usual_clip

    usual = usual_clip(source, base)
    width, cross, height = (size or f"{usual.width}x{usual.height}").partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise UserError(
            f"--size {size} is not width x height, such as {usual.width}x{usual.height}"
        )
    shape = ClipShape(frames or usual.frames, int(height), int(width), fps or usual.fps)
    extras = {"mask_channel": mask_channel, "fps_embed": fps_embed}
    print(
        import_pipeline(source, out, shape, base=base, **extras, expert=expert, boundary=boundary)
    )


def ckpt_export(
    run_dir: Annotated[str, typer.Argument(metavar="RUN[@STEP]")],
    out: Annotated[
        Path, typer.Option(help="The folder to write; of an adapter the .safetensors file.")
    ],
    layout: Annotated[
        str, typer.Option("--to", help="Layout: diffusers, or for an adapter comfyui.")
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
    other_expert: OtherExpert = "",
) -> None:
    """Write a run as a folder that diffusers' WanPipeline samples from, or an adapter's run as one file.

    An adapter's file is loaded by `WanPipeline.load_lora_weights` in both layouts, by ComfyUI in its own. RUN may be
    such a file itself, which is then written in the other layout.

    \b
    sora ckpt export runs/mine --out my_pipeline
    sora ckpt export runs/mine@2000 --out my_pipeline --live --fps 16
    sora ckpt export runs/zork --to comfyui --out zork.safetensors
    """
    if live and ema != "ema":
        raise UserError(f"--live and --ema {ema} name two sets of weights; give one of them")
    if max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb {max_shard_gb:g} holds nothing; 5 is usual")
    from sora_train.tools.convert.adapter_file import export_adapter, holds_adapter

    weights = "live" if live else ema
    if holds_adapter(run_dir):
        if fps is not None:
            raise UserError(f"--fps {fps:g} is for a whole model, and {run_dir} is an adapter")
        print(export_adapter(run_dir, out, layout, weights))
        return
    _require_diffusers("--to", layout)
    from sora_train.checkpoint.layout import split_step
    from sora_train.tools.convert.served import serve_commands
    from sora_train.tools.convert.to_diffusers import export_pipeline

    folder, step = split_step(run_dir)
    options: dict[str, Any] = {"fps": fps, "max_shard_bytes": int(max_shard_gb * 1e9)}
    print(export_pipeline(folder, out, step=step, weights=weights, other=other_expert, **options))
    print("\n".join(serve_commands(out)))


def fetch(arguments: RunArguments = None, config_dir: ConfigDir = None) -> None:
    """Bring what a run needs from the hub into its cache (HF_HOME), on a machine that has a network.

    \b
    sora fetch experiment=quickstart
    sora fetch my.yaml vae.path=Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    """
    from sora_train.config.job import compose_job
    from sora_train.tools.convert.fetch import fetch_weights

    print("\n".join(fetch_weights(compose_job(arguments or [], config_dir=config_dir).runs)))


CHECKPOINT_COMMANDS: dict[str, Callable[..., None]] = {"import": ckpt_import, "export": ckpt_export}
"""Those of `sora ckpt`, in the order of the help."""


def _require_diffusers(flag: str, layout: str) -> None:
    if layout == "comfyui":
        raise UserError(
            f"{flag} comfyui is a layout of adapters, and this is a whole model; the layout for it is: diffusers"
        )
    if layout != "diffusers":
        raise UserError(f"{flag} {layout} is not known; the layout there is: diffusers")
