"""The public API: `sora_train.load(RUN).sample(prompts)`; `sora sample` is a thin skin over it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.layout import STATE, split_step
from sora_train.config import Config, ModelConfig
from sora_train.config.messages import validated
from sora_train.config.renamed import with_new_names
from sora_train.config.yaml_files import load_yaml
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import UserError
from sora_train.models.text_to_video import TextToVideo, VideoDenoiser
from sora_train.models.transformer.attention_backends import missing
from sora_train.models.transformer.dit import check_patches
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.vae.geometry import Geometry
from sora_train.parallel.protocol import resolve_param_dtype
from sora_train.runtime.world import pick_device
from sora_train.sampling.adapters import AdaptedBase, NamedAdapter, adapted_base
from sora_train.sampling.experts import require_both, require_pair
from sora_train.sampling.files import save_clips, save_stills
from sora_train.sampling.operations import Prepared, SampleRequest, prepare
from sora_train.sampling.pipeline import ClipShape, one_each, sample_clips
from sora_train.sampling.ranks.team import Team
from sora_train.sampling.upscale import in_tiles

RATE_TOLERANCE = 0.01
"""By so much a rate may lie outside those trained: 23.976 is 24."""
SETTINGS = {
    "steps": "num_steps",
    **{
        key: key
        for key in (
            "guidance_scale",
            "guidance_scale_2",
            "condition_scale",
            "guidance_from",
            "guidance_to",
            "guidance_rescale",
            "solver",
            "time_grid",
            "time_rounding",
        )
    },
}
"""Fields of the spec that only the sampler reads, by the name under which they can be changed."""
GUIDING = tuple(key for key in SETTINGS if key.startswith(("guidance_", "condition_scale")))
"""Those about guidance, of which a distilled model takes none."""
DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""What `load` takes for `dtype`."""


class Model:
    """A trained text-to-video model with its VAE and the diffusion spec it was trained under."""

    def __init__(
        self,
        cfg: Config,
        spec: DiffusionSpec,
        model: TextToVideo,
        vae: VideoVAE,
        shape: ClipShape,
        step: int,
        adapted: AdaptedBase,
    ):
        self.cfg, self.spec, self.shape, self.step = cfg, spec, shape, step
        self.model, self.vae = model.eval(), vae
        self.model.stays = isinstance(model, TextToVideo)
        self.adapted = adapted
        self.team: Team | None = None
        # Of two experts that are joined later, the one whose base `adapted` is keeps these.
        changed = set(adapted.changed)
        self._changed = {name: one for name, one in model.named_parameters() if name in changed}

    def sample(
        self,
        prompts: list[str],
        *,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        fps: float | None = None,
        seed: int = 0,
        num: int = 1,
        prepared: Prepared | None = None,
        negative_prompt: str | Sequence[str] = "",
        condition_noise: float = 0.0,
        step_cache: float = 0.0,
        on_step: Callable[[int], None] | None = None,
        **settings: Any,
    ) -> list[np.ndarray]:
        """`num` clips a prompt, one prompt's together, uint8 (T, H, W, 3); of several processes the first has them.

        Args:
            size: (width, height) in pixels; default: that of most training clips.
            frames: frames of a clip; default: that of most training clips.
            fps: frames a second, for the model and for playing the clips; default: that of most training clips. An
                image has none, whatever is given: 0 is its own.
            seed: clip i starts from noise keyed by (seed, i).
            prepared: what `prepare` made of images and videos; it has a shape of its own.
            negative_prompt: what guidance leads away from, in place of the empty caption; one for all or one a prompt.
            condition_noise: noise level in [0, 1] at which condition frames are shown to the model.
            step_cache: change up to which the transformer's blocks are skipped, 0.1 for example; 0: never.
            on_step: called after each of the sampler's steps with their number in this batch of clips.
            settings: `steps`, `guidance_scale` (1 is none) or another of SETTINGS in place of the spec's; None leaves
                one alone.

        Raises:
            UserError: no prompt, a size, length or setting that cannot be, or the model is one of two experts.
        """
        require_both(self.spec, "this model", "")
        if prepared and (size or frames or fps):
            raise UserError("size, frames and fps belong to prepare; its result has them already")
        self._require_work(prompts, num, step_cache, prepared)
        shape = prepared.shape if prepared else self.clip_shape(size, frames, fps)
        repeated = [prompt for prompt in prompts for _ in range(num)]
        negatives = [one for one in one_each(negative_prompt, prompts) for _ in range(num)]
        known = prepared.condition_frames if prepared else None
        with in_tiles(self.vae, known.windows if known else None):
            clips = sample_clips(
                self.model,
                self.vae,
                with_settings(self.spec, settings),
                repeated,
                shape,
                seed=seed,
                on_step=on_step,
                negative_prompt=negatives,
                condition_noise=condition_noise,
                step_cache=step_cache,
                condition_frames=known,
                numbers=self.team and self.team.numbers(len(repeated)),
            )
        clips = [prepared.finish(clip) for clip in clips] if prepared else clips
        return self.team.collect(clips, len(repeated)) if self.team else clips

    def _require_work(
        self, prompts: list[str], num: int, step_cache: float, prepared: Prepared | None
    ) -> None:
        """Raises UserError where there is nothing to sample, or a step cache would see a part of a clip's tokens."""
        frames = prepared.condition_frames if prepared else None
        if step_cache and frames and frames.windows:
            raise UserError(
                f"step_cache={step_cache:g} compares a step with the one before, and windows come between; leave it out"
            )
        if not prompts or num < 1:
            raise UserError(
                f"nothing to sample: {len(prompts)} prompts, num={num}; give a prompt and num >= 1"
            )
        sharing = self.team.layout.team if self.team else 1
        if step_cache and sharing > 1:
            raise UserError(
                f"step_cache={step_cache:g} decides by all tokens of a clip, and {sharing} processes share them here; "
                "spread prompts alone, or leave it out"
            )

    def prepare(
        self,
        request: SampleRequest,
        *,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        fps: float | None = None,
    ) -> Prepared:
        """Read the images and videos of a request for `sample`; see docs/sampling.md. Of an upscaled video `size` is
        that which it is made, and `frames` those of a window.

        Raises:
            UserError: a file that cannot be read or does not fit the request.
        """
        if request.op == "upscale":
            request, size = replace(request, size=size, patch=self.cfg.model.patch_size), None
        shape = self.clip_shape(size, frames, fps)
        return prepare(request, shape, self.vae.geometry, self.cfg.data.alpha_background)

    def save(
        self,
        clips: list[np.ndarray],
        labels: list[str],
        out: Path,
        *,
        fps: float | None = None,
        seed: int = 0,
        notes: Sequence[Mapping[str, Any]] = (),
    ) -> list[Path]:
        """Write H.264 mp4 files, contact_sheet.png and prompts.json into `out`; images as PNG as well.

        `seed` is the one the clips were sampled with; it is noted beside them, as `notes` of each clip are.
        """
        seeds, rate = [seed] * len(clips), fps or self.shape.fps
        paths = save_clips(Path(out), clips, labels, fps=rate, seeds=seeds, notes=notes)
        return paths + save_stills(clips, paths)

    def set_strengths(self, *strengths: float) -> None:
        """Use the adapters at other strengths, one for each in their order, an adapter run's own first.

        The base's values of what they change are read again; nothing else is.

        Raises:
            UserError: there are more or fewer adapters.
        """
        adapters = self.adapted.adapters
        if len(strengths) != len(adapters):
            names = ", ".join(adapter.source for adapter in adapters) or "none"
            raise UserError(
                f"{len(strengths)} strengths are given for {len(adapters)} adapters ({names}); give one for each"
            )
        self.adapted.set_strengths(self._changed, strengths)

    def clip_shape(
        self, size: tuple[int, int] | None, frames: int | None, fps: float | None
    ) -> ClipShape:
        """The shape asked for, gaps filled from the bucket that most training clips were in, checked."""
        return fitting_shape(self.cfg, self.vae.geometry, self.shape, size, frames, fps)


def fitting_shape(
    cfg: Config,
    geometry: Geometry,
    usual: ClipShape,
    size: tuple[int, int] | None,
    frames: int | None,
    fps: float | None,
    flag: str = "--size",
) -> ClipShape:
    """The shape asked for, gaps filled from the usual one. Raises UserError, which names the `flag` of the size, when
    VAE or patches cannot take it."""
    multiple = geometry.spatial_factor * math.lcm(*cfg.model.patch_size[1:])
    width, height = size or (usual.width, usual.height)
    if width % multiple or height % multiple or min(width, height) < multiple:
        near_width, near_height = (max(1, round(x / multiple)) * multiple for x in (width, height))
        raise UserError(
            f"{flag} {width}x{height} does not fit the model: width and height must be multiples of {multiple}; "
            f"the nearest is {near_width}x{near_height}"
        )
    count = frames or usual.frames
    if fps is not None and not 0 < fps < 1000 and (fps, count) != (0, 1):
        raise UserError(
            f"--fps is {fps:g}; give frames a second above 0, for example {usual.fps:g}, or 0 for an image (--frames 1)"
        )
    check_patches(cfg.model, *geometry.latent_shape(count, height, width)[1:])
    return ClipShape(count, height, width, fps or usual.fps)


def rate_note(info: "CheckpointInfo", shape: ClipShape) -> str:
    """A sentence where the model is told a frame rate outside those it was trained on, else nothing."""
    if not (info.cfg.model.fps_embed and info.frame_rates and shape.told_fps):
        return ""
    lowest, highest = info.frame_rates
    if lowest * (1 - RATE_TOLERANCE) <= shape.fps <= highest * (1 + RATE_TOLERANCE):
        return ""
    trained = f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
    return (
        f"this run was not trained on clips of {shape.fps:g} frames a second (it was on {trained}), and its model is "
        f"told the rate, so the motion may not be that of the rate; give --fps {info.shape.fps:g}"
    )


def with_settings(spec: DiffusionSpec, settings: Mapping[str, Any]) -> DiffusionSpec:
    """The spec with other sampler settings; None leaves one alone. Raises UserError for one that cannot be."""
    unknown = [key for key in settings if key not in SETTINGS]
    if unknown:
        raise UserError(f"'{unknown[0]}' is no sampler setting; choose among {', '.join(SETTINGS)}")
    changes = {SETTINGS[key]: value for key, value in settings.items() if value is not None}
    guiding = [key for key in GUIDING if changes.get(key, getattr(spec, key)) != getattr(spec, key)]
    if spec.folded_guidance and guiding:
        raise UserError(
            f"{guiding[0]} is {changes[guiding[0]]:g}, and this model was distilled with guidance of "
            f"{spec.folded_guidance:g} in its weights, so it takes no other; leave it out, or sample the run it was "
            "distilled from"
        )
    try:
        return spec.replace(**changes)
    except ValueError as error:
        raise UserError(f"{error}; change {', '.join(settings)}") from error


def require_guidance(spec: DiffusionSpec, negatives: Sequence[str]) -> None:
    """Raises UserError where there is a negative prompt and no guidance to lead away from it."""
    if any(negatives) and spec.folded_guidance:
        raise UserError(
            "a negative prompt needs guidance, and this model was distilled into one without; leave it out, or sample "
            "the run it was distilled from"
        )
    if any(negatives) and spec.guidance_scale == 1:
        raise UserError(
            "a negative prompt needs guidance, and guidance_scale is 1; raise --guidance-scale"
        )


def shipped_config(
    run_dir: Path, name: str = "config.yaml", config_cls: type[Config] = Config
) -> Config:
    """The run's config, or another one in its folder, without the top-level keys that `config_cls` lacks since a
    project's own Config added them; strict in all it keeps.

    They were checked when the run began, and a model of one's own is refused by its weights.
    """
    values = with_new_names(load_yaml(run_dir / name))
    return validated(
        config_cls, {key: value for key, value in values.items() if key in config_cls.model_fields}
    )


def require_dtype(asked: str) -> None:
    """Raises UserError where `load` does not take it for `dtype`."""
    if asked not in DTYPES:
        raise UserError(f"--dtype {asked} is not known; choose one of {', '.join(DTYPES)}")


def dtype_of(asked: str, cfg: Config, device: torch.device) -> torch.dtype:
    """In which the transformer multiplies; see `load`."""
    require_dtype(asked)
    if asked != "auto":
        return DTYPES[asked]
    trained_in = resolve_param_dtype(cfg.parallel.param_dtype, device)
    return torch.float32 if device.type == "cpu" else trained_in


def attending_here(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> ModelConfig:
    """`model` with the attention kernel it was trained with, or where samples are made without it (another
    machine, or weights in another dtype) with the one that `auto` takes: they compute the same."""
    if missing(model.attention, device, dtype, model.head_dim) is None:
        return model
    return model.model_copy(update={"attention": "auto"})


@dataclass(frozen=True)
class CheckpointInfo:
    """Facts of a checkpoint; its weights are not read."""

    checkpoint: checkpoints.Checkpoint
    cfg: Config
    spec: DiffusionSpec
    shape: ClipShape
    frame_rates: tuple[float, ...] = ()
    """The lowest and the highest rate trained; empty where that is not known."""


def checkpoint_info(
    run: Path, step: int | None = None, config_cls: type[Config] = Config
) -> CheckpointInfo:
    """Read a run's config, spec and usual shape of clips: all that checking a request needs.

    Raises:
        UserError: no such run or checkpoint, or the checkpoint is not one of a text-to-video model.
    """
    checkpoint = checkpoints.find(run, step)
    # Not read_meta, which asks for all that training goes on from: sampling needs these keys alone.
    state = checkpoint.state()
    missing = [key for key in ("task", "spec", "sample_shape") if key not in state]
    if missing:
        raise UserError(
            f"{checkpoint.path} cannot be sampled from: its {STATE} holds no {', '.join(missing)}; use the version of "
            "sora_train that wrote it"
        )
    if state["spec"] is None:
        raise UserError(
            f"{run} trained a {state['task']}, which cannot be sampled from; give a text_to_video run"
        )
    try:
        spec = DiffusionSpec.from_dict(state["spec"])
    except ValueError as error:
        raise UserError(
            f"{checkpoint.path} cannot be sampled from: {error}; use the version of sora_train that wrote it"
        ) from error
    cfg = shipped_config(run, config_cls=config_cls)
    shape, rates = ClipShape(**state["sample_shape"]), tuple(state.get("frame_rates", ()))
    return CheckpointInfo(checkpoint, cfg, spec, shape, rates)


class Project(Protocol):
    """What a run of a project of one's own was made with; a `Recipe` is one."""

    @property
    def config(self) -> type[Config]: ...

    @property
    def model(self) -> Callable[..., nn.Module]: ...


def load(
    run: str | Path,
    *,
    step: int | None = None,
    weights: str = "ema",
    device: str = "auto",
    project: Project | None = None,
    adapters: Sequence[str | Path | NamedAdapter] = (),
    base: str = "",
    any_base: bool = False,
    other_expert: str = "",
    dtype: str = "auto",
    team: Team | None = None,
) -> Model:
    """The model of a run folder, or of `RUN@STEP`; of an adapter's run, that of its base with the adapter.

    Args:
        run: a folder that `sora train` wrote, optionally with `@step` behind it.
        step: which checkpoint; default: the newest complete one.
        weights: `ema` (averaged, what samples are meant to be made with), `live`, or one of `ema.more`: `0.9999`; of
            adapters' runs too.
        project: the Recipe of a run with a model, or with keys, of its own.
        adapters: files or runs of adapters that are merged in, `:0.8` behind one for its strength.
        base: FOLDER or FOLDER@STEP of the base of an adapter's run, if it is no longer where `init.run` says.
        any_base: take adapters of another base too, and leave out what the model lacks.
        other_expert: the run, or RUN@STEP, of the other of two experts, whose weights are of the same kind.
        dtype: in which the transformer multiplies: `float32`, `bfloat16`, or `auto`, which is float32 on a CPU and
            elsewhere what the run was trained in. Norms, noise levels and the sampler stay in float32.
        team: of several processes, all of which call this, and then `sample` with the same arguments.

    Raises:
        UserError: no such run or checkpoint, the checkpoint is not one of a text-to-video model, or an adapter does
            not fit it.
    """
    target = team.world.device if team else pick_device(device)
    adapting: dict[str, Any] = {"adapters": adapters, "base": base, "any_base": any_base}
    made = weights, target, dtype, project
    model = _loaded(run, step, *made, other_expert, **adapting)
    if other_expert:
        model = _joined(model, _loaded(other_expert, None, *made))
    if team is not None:
        team.share(model.model, model.vae)
        model.team = team
    return model


def _loaded(
    run: str | Path,
    step: int | None,
    weights: str,
    target: torch.device,
    dtype: str,
    project: Project | None,
    other_expert: str = "",
    **adapting: Any,
) -> Model:
    """One run's model on a device; see `load`."""
    folder, named_step = split_step(str(run))
    config_cls = project.config if project else Config
    info = checkpoint_info(folder, named_step if step is None else step, config_cls)
    if other_expert:
        require_both(info.spec, str(run), other_expert)
        require_pair(info, checkpoint_info(*split_step(other_expert), config_cls))
    adapted = adapted_base(
        info.cfg, info.checkpoint, weights, adapting.pop("adapters", ()), **adapting
    )
    cfg, spec = info.cfg, info.spec
    vae = VideoVAE.from_config(cfg.vae)
    if vae.digest() != spec.vae_digest:
        raise UserError(
            f"{run} was trained on the latents of another VAE than vae.path={cfg.vae.path!r} now holds; "
            "restore that folder"
        )
    computes_in = dtype_of(dtype, cfg, target)
    cfg = cfg.model_copy(update={"model": attending_here(cfg.model, target, computes_in)})
    filled = _filled(cfg, project, adapted)
    # Merged in float32 first; a project's own model may call its transformer otherwise.
    getattr(filled, "transformer", filled).to(computes_in)
    filled = filled.to(target)
    return Model(cfg, spec, filled, vae.to(target), info.shape, info.checkpoint.step, adapted)


def _joined(one: Model, other: Model) -> Model:
    """The first model with the transformers of both, which are the two experts."""
    high, low = (one, other) if one.spec.expert == "high" else (other, one)
    one.model.transformer, one.model.transformer_2 = high.model.transformer, low.model.transformer
    sizes = one.cfg.model.model_copy(update={"expert": "both"})
    one.cfg, one.spec = one.cfg.model_copy(update={"model": sizes}), one.spec.replace(expert="both")
    return one


def _filled(cfg: Config, project: Project | None, adapted: AdaptedBase) -> Any:
    """The model with the base's weights and the adapters."""
    built = (
        project.model(cfg)
        if project
        else TextToVideo(cfg.model, cfg.text, cfg.image, seed=cfg.seed)
    )
    if not isinstance(built, VideoDenoiser):
        raise UserError(
            f"{type(built).__name__} cannot be sampled from: it lacks what VideoDenoiser asks of a model "
            "(sora_train/models/text_to_video.py)"
        )
    model: Any = built
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    prefix = adapted.base.prefix
    tensors = {f"{prefix}{name}": value for name, value in parameters.items()}
    checkpoints.load_part(adapted.base.checkpoint, tensors, prefix)
    adapted.merge_into(parameters)
    return model
