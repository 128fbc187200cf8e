"""`sora sample`: its flags and help, what they mean as values, and the clips."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sora_train.base.text import NotText, lines_of, read_text, require_text
from sora_train.errors import UserError
from sora_train.tools.terminal import AdapterBase, Adapters, AnyBase, ProjectFile

if TYPE_CHECKING:
    from sora_train.diffusion.spec import DiffusionSpec
    from sora_train.sampling.operations import SampleRequest
    from sora_train.training.recipe import Recipe

Ckpt = Annotated[str, typer.Option(help="A run folder, or RUN@STEP for an older checkpoint.")]
Weights = Annotated[
    str,
    typer.Option("--ema", metavar="TAG", help="Another average, one of ema.more: 0.9999; or live."),
]
Out = Annotated[Path, typer.Option(help="Folder for the mp4 files and the contact sheet.")]
Prompt = Annotated[list[str] | None, typer.Option(help="What to show; may be given several times.")]
Prompts = Annotated[Path | None, typer.Option(help="A text file with one prompt a line.")]
NegativePrompt = Annotated[str, typer.Option(help="What guidance leads away from.")]
Op = Annotated[
    str,
    typer.Option(
        help="What to make: t2v, t2i, i2v, extend, extend-back, infill, connect, loop or edit."
    ),
]
Image = Annotated[Path | None, typer.Option(help="The image a clip begins with.")]
LastImage = Annotated[Path | None, typer.Option(help="The image a clip ends with.")]
Video = Annotated[
    list[Path] | None, typer.Option(help="The video to work on; twice for --op connect.")
]
FramesGiven = Annotated[
    int | None, typer.Option(min=1, help="Frames taken from each video, at the clip's rate.")
]
Gap = Annotated[
    str | None, typer.Option(metavar="A:B", help="Frames A to B - 1 are made anew (infill).")
]
Strength = Annotated[
    str | None,
    typer.Option(
        metavar="S[,S...]",
        help="How much an edit changes, 0 to 1; several are spread over the clip.",
    ),
]
ConditionNoise = Annotated[
    float, typer.Option(min=0, max=1, help="Noise level at which given frames are shown.")
]
Size = Annotated[
    str | None, typer.Option(metavar="WxH", help="Pixels; as in training if left out.")
]
Frames = Annotated[
    int | None, typer.Option(min=1, help="Frames of a clip, given ones too; as in training.")
]
Fps = Annotated[
    float | None, typer.Option(help="Frames a second; those of most training clips if left out.")
]
Seed = Annotated[int, typer.Option(help="Seed of the noise; the same seed gives the same clip.")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Solver steps; those of the run if left out.")
]
Solver = Annotated[
    str | None, typer.Option(help="euler, heun or unipc; that of the run if left out.")
]
GuidanceScale = Annotated[float | None, typer.Option(min=1, help="1 switches guidance off.")]
GuidanceScale2 = Annotated[
    float | None, typer.Option(min=0, help="That of the low-noise expert, of a model of two.")
]
OtherExpert = Annotated[
    str,
    typer.Option(metavar="RUN", help="The run of the other expert, where --ckpt holds one of two."),
]
ConditionScale = Annotated[
    float | None, typer.Option(min=0, help="Guidance by the given frames; 1 switches it off.")
]
GuidanceInterval = Annotated[
    str | None, typer.Option(metavar="A:B", help="Guide only at noise levels from A to B.")
]
GuidanceRescale = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of guidance's extra contrast taken back.")
]
Num = Annotated[int, typer.Option(min=1, help="Clips a prompt.")]


def sample(
    ckpt: Ckpt,
    out: Out = Path("samples"),
    prompt: Prompt = None,
    prompts: Prompts = None,
    negative_prompt: NegativePrompt = "",
    op: Op = "t2v",
    image: Image = None,
    last_image: LastImage = None,
    video: Video = None,
    frames_given: FramesGiven = None,
    gap: Gap = None,
    strength: Strength = None,
    condition_noise: ConditionNoise = 0.0,
    size: Size = None,
    frames: Frames = None,
    fps: Fps = None,
    seed: Seed = 0,
    steps: Steps = None,
    solver: Solver = None,
    guidance_scale: GuidanceScale = None,
    guidance_scale_2: GuidanceScale2 = None,
    condition_scale: ConditionScale = None,
    guidance_interval: GuidanceInterval = None,
    guidance_rescale: GuidanceRescale = None,
    num: Num = 1,
    ema: Weights = "ema",
    other_expert: OtherExpert = "",
    adapter: Adapters = None,
    base: AdapterBase = "",
    any_base: AnyBase = False,
    project: ProjectFile = None,
) -> None:
    """Sample clips from a checkpoint into mp4 files and a contact sheet.

    \b
    sora sample --ckpt runs/quickstart --prompt "red circle moves left" --num 4
    sora sample --ckpt runs/quickstart@600 --prompts prompts.txt --out clips --seed 7
    sora sample --ckpt RUN --prompt "..." --op i2v --image first.png --last-image last.png
    sora sample --ckpt RUN --prompt "..." --op extend --video a.mp4 --frames-given 9
    sora sample --ckpt RUN --prompt "..." --op infill --video a.mp4 --gap 5:13
    sora sample --ckpt RUN --prompt "..." --op connect --video a.mp4 --video b.mp4
    sora sample --ckpt RUN --prompt "..." --op edit --video a.mp4 --strength 0.6
    sora sample --ckpt RUN --prompt "..." --adapter zork.safetensors:0.8 --adapter runs/style
    """
    from sora_train.sampling.operations import SampleRequest

    settings: dict[str, Any] = {"steps": steps, "solver": solver, "guidance_scale": guidance_scale}
    settings |= {"condition_scale": condition_scale, "guidance_scale_2": guidance_scale_2}
    settings |= {"guidance_rescale": guidance_rescale, **_interval(guidance_interval)}
    files = image, last_image, tuple(video or ())
    request = SampleRequest(op, *files, frames_given, _gap(gap), _levels(strength))
    given = [require_text(text, "--prompt") for text in prompt or []] + prompt_lines(prompts)
    options: dict[str, Any] = {"seed": seed, "num": num, "condition_noise": condition_noise}
    options["negative_prompt"] = require_text(negative_prompt, "--negative-prompt")
    adapting: dict[str, Any] = {"adapters": adapter or [], "other_expert": other_expert}
    adapting |= {"base": base, "any_base": any_base}
    shape = _size(size), frames, fps
    asked = ckpt, ema, given, request, shape, settings, options, out, adapting, project
    print(*sample_to_folder(*asked), sep="\n")


def sample_to_folder(
    ckpt: str,
    weights: str,
    prompts: list[str],
    request: "SampleRequest",
    shape: tuple[tuple[int, int] | None, int | None, float | None],
    settings: dict[str, Any],
    options: dict[str, Any],
    out: Path,
    adapting: dict[str, Any],
    project: Path | None = None,
) -> list[Path]:
    """Sample every prompt from a checkpoint into `out`; returns the files written.

    Everything is checked, and the files of the request are read, before the model is loaded.

    Args:
        weights: as `sora_train.load` takes them.
        shape: size, frames and fps, None for the run's own.
        settings: of the sampler, as `Model.sample` takes them.
        adapting: the arguments adapters, base, any_base and other_expert of `sora_train.load`.
        project: the file of a run with a model of its own.
        options: the arguments seed, num, condition_noise and negative_prompt of `Model.sample`.
    """
    request.check()
    if not prompts:
        raise UserError('no prompt is given; add --prompt "..." or --prompts FILE')
    from sora_train.checkpoint.layout import split_step
    from sora_train.checkpoint.tensors import StoredTensors
    from sora_train.config import Config
    from sora_train.models.text.lengths import CaptionLengths
    from sora_train.models.vae.autoencoder import read_geometry
    from sora_train.sampling import api
    from sora_train.sampling.experts import require_both
    from sora_train.sampling.operations import prepare

    recipe = _recipe(project)
    run_dir, step = split_step(ckpt)
    info = api.checkpoint_info(run_dir, step, recipe.config if recipe else Config)
    StoredTensors(info.checkpoint).prefix(weights)
    require_both(info.spec, ckpt, adapting["other_expert"])
    spec = api.with_settings(info.spec, settings)
    cfg, geometry = info.cfg, read_geometry(info.cfg.vae)
    fitting = api.fitting_shape(cfg, geometry, info.shape, *shape)
    prepared = prepare(request, fitting, geometry, cfg.data.alpha_background)
    _require_use(request.op, prepared.kind, spec, settings, options)
    notes = [prepared.note(spec, request.op), api.rate_note(info, prepared.shape)]
    lengths = CaptionLengths(info.cfg.text)
    notes += lengths.cut_notes(prompts)
    notes += lengths.cut_notes([options["negative_prompt"]], "the negative prompt")
    for note in filter(None, notes):
        print(note, file=sys.stderr)
    model = api.load(
        run_dir, step=info.checkpoint.step, weights=weights, project=recipe, **adapting
    )
    for note in model.adapted.notes:
        print(note, file=sys.stderr)
    clips = model.sample(prompts, prepared=prepared, **options, **settings)
    labels = [prompt for prompt in prompts for _ in range(options["num"])]
    return model.save(clips, labels, out, fps=prepared.shape.fps, seed=options["seed"])


def _recipe(project: Path | None) -> "Recipe | None":
    """The recipe of a run with a model of its own."""
    if project is None:
        return None
    from sora_train.training.recipe import load_recipe

    return load_recipe(project)


def _require_use(
    op: str, kind: str, spec: "DiffusionSpec", settings: dict[str, Any], options: dict[str, Any]
) -> None:
    """Raises UserError where a flag would change nothing."""
    noise, scale = options["condition_noise"], settings["condition_scale"]
    for flag, value in (("--condition-noise", noise), ("--condition-scale", scale)):
        if value and kind == "t2v":
            raise UserError(
                f"{flag} {value:g} is about given frames, and --op {op} gives none; drop it"
            )
    if options["negative_prompt"] and spec.guidance_scale == 1:
        raise UserError(
            "--negative-prompt needs guidance, and guidance_scale is 1; raise --guidance-scale"
        )


def prompt_lines(path: Path | None) -> list[str]:
    """The prompts of a text file, one a line."""
    if path is None:
        return []
    try:
        text = read_text(path)
    except (OSError, NotText) as error:
        raise UserError(f"--prompts {path} cannot be read as text: {error}") from None
    lines = [line.strip() for line in lines_of(text) if line.strip()]
    if not lines:
        raise UserError(f"--prompts {path} holds no prompts; write one a line")
    return lines


def _size(text: str | None) -> tuple[int, int] | None:
    """WxH -> (width, height)."""
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise UserError(f"--size is '{text}'; write WIDTHxHEIGHT in pixels, for example 64x48")
    return int(width), int(height)


def _gap(text: str | None) -> tuple[int, int] | None:
    """A:B -> (A, B)."""
    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise UserError(f"--gap is '{text}'; write FIRST:END in frames, for example 5:13")
    return int(first), int(end)


def _levels(text: str | None) -> tuple[float, ...]:
    """S,S,... -> numbers."""
    try:
        return () if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--strength is '{text}'; write a number from 0 to 1, or several such as 0.2,0.9"
        ) from None


def _interval(text: str | None) -> dict[str, float]:
    """A:B -> the settings `guidance_from` and `guidance_to`."""
    if text is None:
        return {}
    lowest, _, highest = text.partition(":")
    try:
        return {"guidance_from": float(lowest), "guidance_to": float(highest)}
    except ValueError:
        raise UserError(
            f"--guidance-interval is '{text}'; write noise levels LOWEST:HIGHEST, for example 0.1:0.8"
        ) from None
