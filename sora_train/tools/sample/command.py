"""`sora sample`: its help, and the clips."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_train.errors import UserError
from sora_train.tools.sample import flags
from sora_train.tools.terminal import AdapterBase, Adapters, AnyBase, ProjectFile

if TYPE_CHECKING:
    from sora_train.diffusion.spec import DiffusionSpec
    from sora_train.sampling.operations import SampleRequest
    from sora_train.sampling.prompts.written import Written
    from sora_train.training.recipe import Recipe


def sample(
    ckpt: flags.Ckpt,
    out: flags.Out = Path("samples"),
    prompt: flags.Prompt = None,
    prompts: flags.Prompts = None,
    negative_prompt: flags.NegativePrompt = "",
    op: flags.Op = "t2v",
    image: flags.Image = None,
    last_image: flags.LastImage = None,
    video: flags.Video = None,
    frames_given: flags.FramesGiven = None,
    gap: flags.Gap = None,
    strength: flags.Strength = None,
    condition_noise: flags.ConditionNoise = 0.0,
    size: flags.Size = None,
    frames: flags.Frames = None,
    fps: flags.Fps = None,
    seed: flags.Seed = 0,
    steps: flags.Steps = None,
    solver: flags.Solver = None,
    guidance_scale: flags.GuidanceScale = None,
    guidance_scale_2: flags.GuidanceScale2 = None,
    condition_scale: flags.ConditionScale = None,
    guidance_interval: flags.GuidanceInterval = None,
    guidance_rescale: flags.GuidanceRescale = None,
    num: flags.Num = 1,
    ema: flags.Weights = "ema",
    other_expert: flags.OtherExpert = "",
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
    from sora_train.sampling.prompts.file import read_prompts
    from sora_train.sampling.prompts.written import Written, clean

    settings: dict[str, Any] = {"steps": steps, "solver": solver, "guidance_scale": guidance_scale}
    settings |= {"condition_scale": condition_scale, "guidance_scale_2": guidance_scale_2}
    settings |= {"guidance_rescale": guidance_rescale, **flags.interval_of(guidance_interval)}
    files = image, last_image, tuple(video or ())
    request = SampleRequest(op, *files, frames_given, flags.gap_of(gap), flags.levels_of(strength))
    given = [Written(prompt=clean(text, "--prompt")) for text in prompt or []]
    given += read_prompts(prompts) if prompts else []
    options: dict[str, Any] = {"seed": seed, "num": num, "condition_noise": condition_noise}
    options["negative_prompt"] = clean(negative_prompt, "--negative-prompt")
    adapting: dict[str, Any] = {"adapters": adapter or [], "other_expert": other_expert}
    adapting |= {"base": base, "any_base": any_base}
    shape = flags.size_of(size), frames, fps
    asked = ckpt, ema, given, request, shape, settings, options, out, adapting, project
    print(*sample_to_folder(*asked), sep="\n")


def sample_to_folder(
    ckpt: str,
    weights: str,
    written: "list[Written]",
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
    if not written:
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
    prompts = [one.text(cfg.data.source) for one in written]
    options["negative_prompt"] = [one.negative or options["negative_prompt"] for one in written]
    _require_use(request.op, prepared.kind, spec, settings, options)
    notes = [prepared.note(spec, request.op), api.rate_note(info, prepared.shape)]
    lengths = CaptionLengths(info.cfg.text)
    notes += lengths.cut_notes(prompts)
    notes += lengths.cut_notes(options["negative_prompt"], "the negative prompt")
    for note in filter(None, notes):
        print(note, file=sys.stderr)
    model = api.load(
        run_dir, step=info.checkpoint.step, weights=weights, project=recipe, **adapting
    )
    for note in model.adapted.notes:
        print(note, file=sys.stderr)
    clips = model.sample(prompts, prepared=prepared, **options, **settings)
    labels = [prompt for prompt in prompts for _ in range(options["num"])]
    beside = [
        {"negative": negative} if negative else {}
        for negative in options["negative_prompt"]
        for _ in range(options["num"])
    ]
    rate, seed = prepared.shape.fps, options["seed"]
    return model.save(clips, labels, out, fps=rate, seed=seed, notes=beside)


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
    if any(options["negative_prompt"]) and spec.guidance_scale == 1:
        raise UserError(
            "a negative prompt needs guidance, and guidance_scale is 1; raise --guidance-scale"
        )
