"""The work of `sora sample`: what was asked becomes values, is checked whole, and then made."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sora_train.checkpoint.layout import split_step
from sora_train.checkpoint.tensors import StoredTensors
from sora_train.config import Config
from sora_train.data.index.kinds import media_kind
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import UserError
from sora_train.models.text.lengths import CaptionLengths
from sora_train.models.vae.autoencoder import read_geometry
from sora_train.runtime.world import World
from sora_train.sampling import api
from sora_train.sampling.experts import require_both
from sora_train.sampling.given_files import GivenFile
from sora_train.sampling.long.asked import by_storyboard, storyboard_window, takes_windows
from sora_train.sampling.operations import Prepared, SampleRequest, prepare
from sora_train.sampling.pipeline import CLIPS_AT_ONCE, views_of
from sora_train.sampling.prompts.file import read_prompts
from sora_train.sampling.prompts.placing import with_references
from sora_train.sampling.prompts.script import Script
from sora_train.sampling.prompts.storyboard import Storyboard, one_prompt
from sora_train.sampling.prompts.upsampling import Upsampler
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
    seed: int
    notes: list[str]
    """Sentences for the user."""
    layout: Layout
    """What several processes do."""
    script: Script | None = None
    """Of a storyboard that takes several windows."""
    written: tuple[str, ...] = ()
    """The prompts before they were made longer."""

    @property
    def beside(self) -> list[dict[str, str]]:
        """What stands in prompts.json beside each prompt."""
        rows = zip(self.prompts, self.written, self.negatives, strict=True)
        return [
            ({"written": written} if written != prompt else {})
            | ({"negative": negative} if negative else {})
            for prompt, written, negative in rows
        ]


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
    model = loaded(asked, work, team)
    for note in model.adapted.notes if is_main else []:
        print(note, file=sys.stderr)
    clips = model.sample(
        work.prompts,
        prepared=work.prepared,
        negative_prompt=work.negatives,
        condition_noise=asked.condition_noise,
        step_cache=asked.step_cache,
        seed=work.seed,
        num=asked.num,
        **work.settings,
    )
    if not is_main:
        return []
    labels = [prompt for prompt in work.prompts for _ in range(asked.num)]
    beside = [row for row in work.beside for _ in range(asked.num)]
    rate = work.prepared.shape.fps
    return model.save(clips, labels, asked.out, fps=rate, seed=work.seed, notes=beside)


def require_no_long(asked: SimpleNamespace) -> None:
    """Raises UserError for a flag of long videos alone."""
    for name in ("anchor_fps", "smooth_fps", "refine"):
        if (value := getattr(asked, name)) is not None:
            flag = f"--{name.replace('_', '-')}"
            shown = value if isinstance(value, str) else f"{value:g}"
            raise UserError(f"{flag} {shown} is about long videos; give their --seconds too")


def checked(asked: SimpleNamespace, processes: int = 1) -> Work:
    """The work that is asked for, of so many processes. Raises UserError for whatever cannot be."""
    settings = _settings(asked)
    board = _storyboard(asked)
    request = _request(asked)
    written, negative = _written(asked, board)
    api.require_dtype(asked.dtype)
    recipe = load_recipe(asked.project) if asked.project else None
    run_dir, step = split_step(asked.ckpt)
    info = api.checkpoint_info(run_dir, step, recipe.config if recipe else Config)
    StoredTensors(info.checkpoint).prefix(asked.ema)
    require_both(info.spec, asked.ckpt, asked.other_expert)
    spec = api.with_settings(info.spec, settings)
    cfg = info.cfg
    seed = asked.seed if asked.seed is not None else board.asked.seed or 0 if board else 0
    plain = [one.text(cfg.data.source) for one in written]
    prompts, notes = _texts(asked, plain, cfg, seed)
    negatives = [one.negative or negative for one in written]
    notes += CaptionLengths(cfg.text).cut_notes(negatives, "the negative prompt")
    script: Script | None = None
    if board:
        window = storyboard_window(board, info, _storyboard_size(asked, board), asked.fps)
        long = asked.seconds is not None
        prepared, script = by_storyboard(board, info, window, prompts, long=long)
        prompts = [prompts[0] if script else one_prompt(prompts, board, prepared.shape)]
        plain, negatives = plain[:1], negatives[:1]
    else:
        prepared = _by_operation(asked, request, info)
    _require_use(asked, prepared.kind, spec, negatives)
    what = "this storyboard" if board else "--reference" if asked.reference else request.op
    notes += [prepared.note(spec, what), *prepared.told, api.rate_note(info, prepared.shape)]
    views = views_of(spec, conditioned=prepared.condition_frames is not None)
    clips = len(prompts) * asked.num
    layout = layout_of(asked.parallel, processes, clips, views, CLIPS_AT_ONCE)
    notes += [f"{processes} processes: --parallel {layout}"] if processes > 1 else []
    told = list(filter(None, notes))
    made = prompts, negatives, prepared, settings, seed, told, layout, script, tuple(plain)
    return Work(run_dir, recipe, info, *made)


def _request(asked: SimpleNamespace) -> SampleRequest:
    """The operation. Raises UserError where its files or values do not fit it."""
    files = asked.image, asked.last_image, tuple(asked.video or ())
    given = asked.frames_given, flags.gap_of(asked.gap), flags.levels_of(asked.strength)
    size = flags.size_of(asked.size)
    request = SampleRequest(asked.op, *files, *given, size=size if asked.op == "upscale" else None)
    request.check()
    if request.size and asked.fps:
        raise UserError("--op upscale keeps a video's own rate; leave out --fps")
    if asked.reference and asked.op != "t2v":
        raise UserError(f"--op {asked.op} takes no --reference; it leads in what --op t2v makes")
    return request


def _storyboard(asked: SimpleNamespace) -> Storyboard | None:
    """The storyboard, if there is one. Raises UserError where a flag is given for what it says itself."""
    if asked.storyboard is None:
        return None
    said: tuple[str, ...] = (
        "prompt",
        "prompts",
        "negative_prompt",
        "image",
        "last_image",
        "video",
        "reference",
    )
    said += ("frames", "frames_given", "gap", "strength")
    given = [name for name in said if getattr(asked, name)] + ["op"] * (asked.op != "t2v")
    if given:
        raise UserError(
            f"--storyboard says what is made when; leave out --{given[0].replace('_', '-')}, or the storyboard"
        )
    return Storyboard.read(asked.storyboard)


def _written(asked: SimpleNamespace, board: Storyboard | None) -> tuple[list[Written], str]:
    """The prompts, and what guidance leads away from where a prompt does not say."""
    if board:
        return list(board.prompts.values()), board.asked.negative
    written = [Written(prompt=clean(text, "--prompt")) for text in asked.prompt or []]
    written += read_prompts(asked.prompts) if asked.prompts else []
    if not written:
        raise UserError(
            'no prompt is given; add --prompt "...", --prompts FILE or --storyboard FILE'
        )
    return written, clean(asked.negative_prompt, "--negative-prompt")


def _texts(
    asked: SimpleNamespace, prompts: list[str], cfg: Config, seed: int
) -> tuple[list[str], list[str]]:
    """What the model reads of each prompt, and sentences on what was done to them."""
    lengths = CaptionLengths(cfg.text)
    if not asked.upsample:
        return prompts, lengths.cut_notes(prompts)
    upsampler = Upsampler(
        asked.upsample,
        asked.upsample_model,
        cfg.data.source,
        seed,
        lambda text: not lengths.lost(text),
    )
    texts = upsampler.all(prompts)
    return texts, upsampler.notes + lengths.cut_notes(texts)


def _by_operation(
    asked: SimpleNamespace, request: SampleRequest, info: api.CheckpointInfo
) -> Prepared:
    """A clip by an operation, or led in by references."""
    cfg, geometry = info.cfg, read_geometry(info.cfg.vae)
    size = None if request.size else flags.size_of(asked.size)
    shape = api.fitting_shape(cfg, geometry, info.shape, size, asked.frames, asked.fps)
    request = replace(request, patch=cfg.model.patch_size)
    if not asked.reference:
        return prepare(request, shape, geometry, cfg.data.alpha_background)
    files = [
        GivenFile.open(path, media_kind(path.name) or "image", "--reference")
        for path in asked.reference
    ]
    return with_references(files, shape, geometry, cfg.data.alpha_background)


def storyboard_seconds(asked: SimpleNamespace) -> float | None:
    """The length of a storyboard that takes more than one window of the model; None of a shorter one."""
    if asked.seconds is not None:
        raise UserError("--storyboard says how long the video is; leave out --seconds")
    board = _storyboard(asked)
    assert board is not None
    recipe = load_recipe(asked.project) if asked.project else None
    info = api.checkpoint_info(*split_step(asked.ckpt), recipe.config if recipe else Config)
    window = storyboard_window(board, info, _storyboard_size(asked, board), asked.fps)
    return board.asked.seconds if takes_windows(board, info, window) else None


def _storyboard_size(asked: SimpleNamespace, board: Storyboard) -> tuple[int, int] | None:
    return flags.size_of(asked.size) or flags.size_of(
        board.asked.size or None, f"{board.path} size"
    )


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


def loaded(asked: SimpleNamespace, work: Work, team: Team | None = None) -> api.Model:
    """The model that is asked for."""
    return api.load(
        work.run_dir,
        step=work.info.checkpoint.step,
        weights=asked.ema,
        project=work.recipe,
        adapters=asked.adapter or [],
        base=asked.base,
        any_base=asked.any_base,
        other_expert=asked.other_expert,
        dtype=asked.dtype,
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
    api.require_guidance(spec, negatives)
