"""The work of `sora sample`: what was asked becomes values, is checked whole, and then made."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sora_train.checkpoint.layout import split_step
from sora_train.checkpoint.tensors import StoredTensors
from sora_train.config import Config
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import UserError
from sora_train.models.text.lengths import CaptionLengths
from sora_train.models.vae.autoencoder import read_geometry
from sora_train.runtime.world import World
from sora_train.sampling import api
from sora_train.sampling.experts import require_both
from sora_train.sampling.operations import Prepared, SampleRequest, prepare
from sora_train.sampling.pipeline import CLIPS_AT_ONCE, views_of
from sora_train.sampling.prompts.file import read_prompts
from sora_train.sampling.prompts.written import Written, clean
from sora_train.sampling.ranks.layout import Layout, layout_of
from sora_train.sampling.ranks.team import Team
from sora_train.tools.sample import flags
from sora_train.training.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Work:
    """What is to be made, checked; no model is loaded yet."""

    run_dir: Path
    recipe: Recipe | None
    info: api.CheckpointInfo
    prompts: list[str]
    negatives: list[str]
    prepared: Prepared
    settings: dict[str, Any]
    """Of the sampler, as `Model.sample` takes them."""
    notes: list[str]
    """Sentences for the user."""
    layout: Layout
    """What several processes do."""


def sample_to_folder(asked: SimpleNamespace, world: World | None = None) -> list[Path]:
    """Sample every prompt into `asked.out`; returns the files written, which is the work of the first process.

    Everything is checked, and the files of the request are read, before the model is loaded.

    Args:
        asked: the values of the flags of `sora sample` by name.
        world: of several processes.
    """
    work = checked(asked, world.size if world else 1)
    team = Team(world, work.layout, work.info.cfg.model) if world else None
    is_main = world is None or world.is_main
    if not is_main:
        work.notes.clear()
    for note in work.notes:
        print(note, file=sys.stderr)
    model = _loaded(asked, work, team)
    for note in model.adapted.notes if is_main else []:
        print(note, file=sys.stderr)
    clips = model.sample(
        work.prompts,
        prepared=work.prepared,
        negative_prompt=work.negatives,
        condition_noise=asked.condition_noise,
        seed=asked.seed,
        num=asked.num,
        **work.settings,
    )
    if not is_main:
        return []
    labels = [prompt for prompt in work.prompts for _ in range(asked.num)]
    beside = [{"negative": one} if one else {} for one in work.negatives for _ in range(asked.num)]
    rate = work.prepared.shape.fps
    return model.save(clips, labels, asked.out, fps=rate, seed=asked.seed, notes=beside)


def checked(asked: SimpleNamespace, processes: int = 1) -> Work:
    """The work that is asked for, of so many processes. Raises UserError for whatever cannot be."""
    settings = _settings(asked)
    files = asked.image, asked.last_image, tuple(asked.video or ())
    given = asked.frames_given, flags.gap_of(asked.gap), flags.levels_of(asked.strength)
    request = SampleRequest(asked.op, *files, *given)
    written = [Written(prompt=clean(text, "--prompt")) for text in asked.prompt or []]
    written += read_prompts(asked.prompts) if asked.prompts else []
    negative = clean(asked.negative_prompt, "--negative-prompt")
    shape = flags.size_of(asked.size), asked.frames, asked.fps
    request.check()
    if not written:
        raise UserError('no prompt is given; add --prompt "..." or --prompts FILE')
    recipe = load_recipe(asked.project) if asked.project else None
    run_dir, step = split_step(asked.ckpt)
    info = api.checkpoint_info(run_dir, step, recipe.config if recipe else Config)
    StoredTensors(info.checkpoint).prefix(asked.ema)
    require_both(info.spec, asked.ckpt, asked.other_expert)
    spec = api.with_settings(info.spec, settings)
    cfg, geometry = info.cfg, read_geometry(info.cfg.vae)
    fitting = api.fitting_shape(cfg, geometry, info.shape, *shape)
    prepared = prepare(request, fitting, geometry, cfg.data.alpha_background)
    prompts = [one.text(cfg.data.source) for one in written]
    negatives = [one.negative or negative for one in written]
    _require_use(asked, prepared.kind, spec, negatives)
    notes = [prepared.note(spec, request.op), api.rate_note(info, prepared.shape)]
    lengths = CaptionLengths(cfg.text)
    notes += lengths.cut_notes(prompts)
    notes += lengths.cut_notes(negatives, "the negative prompt")
    views = views_of(spec, conditioned=prepared.condition_frames is not None)
    clips = len(prompts) * asked.num
    layout = layout_of(asked.parallel, processes, clips, views, CLIPS_AT_ONCE)
    notes += [f"{processes} processes: --parallel {layout}"] if processes > 1 else []
    told = list(filter(None, notes))
    return Work(run_dir, recipe, info, prompts, negatives, prepared, settings, told, layout)


def _settings(asked: SimpleNamespace) -> dict[str, Any]:
    """The sampler's settings by the flags; None for those of the run."""
    names = (
        "steps",
        "solver",
        "guidance_scale",
        "condition_scale",
        "guidance_scale_2",
        "guidance_rescale",
    )
    given = {name: getattr(asked, name) for name in names}
    return given | flags.interval_of(asked.guidance_interval)


def _loaded(asked: SimpleNamespace, work: Work, team: Team | None) -> api.Model:
    return api.load(
        work.run_dir,
        step=work.info.checkpoint.step,
        weights=asked.ema,
        project=work.recipe,
        adapters=asked.adapter or [],
        base=asked.base,
        any_base=asked.any_base,
        other_expert=asked.other_expert,
        team=team,
    )


def _require_use(
    asked: SimpleNamespace, kind: str, spec: DiffusionSpec, negatives: list[str]
) -> None:
    """Raises UserError where a flag would change nothing."""
    noise, scale = asked.condition_noise, asked.condition_scale
    for flag, value in (("--condition-noise", noise), ("--condition-scale", scale)):
        if value and kind == "t2v":
            raise UserError(
                f"{flag} {value:g} is about given frames, and --op {asked.op} gives none; drop it"
            )
    if any(negatives) and spec.guidance_scale == 1:
        raise UserError(
            "a negative prompt needs guidance, and guidance_scale is 1; raise --guidance-scale"
        )
