"""A run, sampled on fixed prompts with fixed noise: text to video, and the operations that it was trained for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sora_train.config import Config
from sora_train.data.sample import Clip
from sora_train.data.shapes.world import eval_prompts
from sora_train.diffusion.condition_frames import pixel_mask
from sora_train.diffusion.condition_masks import ends_mask, kind_for
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import Fault, UserError
from sora_train.evaluation.cases import Case, Sampled, asked_by
from sora_train.evaluation.probes.every import PROBES
from sora_train.objectives import TextToVideoObjective
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World
from sora_train.sampling.api import CheckpointInfo, Model
from sora_train.sampling.pipeline import ClipShape, ConditionFrames, sample_clips
from sora_train.training.pipeline.validation_clips import held_out_clips

EDIT_STRENGTH = 0.6
MOST_CONDITIONED = 8
"""Clips of each operation: they are sampled one by one."""
LOSS_CLIPS = 64


# --- what is asked ---


def held_out(info: CheckpointInfo, run: Path, model: Model) -> tuple[list[Clip], str]:
    """The run's held-out clips, and a sentence where they cannot be read."""
    paths = info.cfg.run.model_copy(update={"dir": str(run)})
    validation = info.cfg.validation.model_copy(
        update={"max_clips": max(LOSS_CLIPS, info.cfg.validation.max_clips)}
    )
    cfg = info.cfg.model_copy(update={"run": paths, "validation": validation})
    try:
        clips = held_out_clips(cfg, model.vae, with_latents=True)
    except (UserError, Fault, OSError) as error:
        return [], f"The held-out clips cannot be read, so nothing is compared with them: {error}."
    return clips, "" if clips else "The run holds no clips out, so nothing is compared with them."


def of_shapes(cfg: Config) -> bool:
    return cfg.data.source == "shapes" or cfg.data.source.startswith("shapes:")


def prompts_of(cfg: Config, given: Sequence[str], clips: Sequence[Clip], count: int) -> list[str]:
    """Those given, else of the shapes world half of seen and half of held-out combinations, else captions of held-out
    clips, else the run's own `sample.prompts`.

    Raises UserError where there are none.
    """
    if not given and of_shapes(cfg):
        seen, unseen = (eval_prompts(count, held_out=kind) for kind in (False, True))
        pairs = zip(seen, unseen, strict=True)
        given = [prompt.text for pair in pairs for prompt in pair]
    found = list(given) or list(dict.fromkeys(clip.caption for clip in clips if clip.caption))
    found = found or list(cfg.sample.prompts)
    if not found:
        raise UserError("there is no prompt to sample: the run holds no clips out; give --prompts")
    return found[:count]


def cases_of(
    info: CheckpointInfo, prompts: Sequence[str], clips: Sequence[Clip], shape: ClipShape
) -> list[Case]:
    """Text to video of every prompt, then the operations on held-out clips of the shape, then the probes."""
    shapes = of_shapes(info.cfg)
    cases = [Case("t2v", prompt, asked=asked_by(prompt) if shapes else None) for prompt in prompts]
    sources = [
        (clip.pixels[: shape.frames], clip.caption)
        for clip in clips
        if clip.pixels is not None
        and clip.pixels.shape[1:3] == (shape.height, shape.width)
        and len(clip.pixels) >= shape.frames
    ][:MOST_CONDITIONED]
    for op in operations(info.spec):
        for number, (source, caption) in enumerate(sources):
            other = prompts[number % len(prompts)] if op == "edit" else caption
            cases.append(Case(op, other, op, source))
    for probe in PROBES:
        if shapes or not probe.shapes_only:
            size = shape.frames, shape.height, shape.width, shape.fps
            asked = probe.ask(*size, MOST_CONDITIONED)
            cases += [case for case in asked if case.op in ("t2v", *operations(info.spec))]
    return cases


def operations(spec: DiffusionSpec) -> list[str]:
    """Those that the run was trained for; an edit needs no training of its own."""
    trained = {kind for kind, share in spec.conditioning if share > 0}
    return [op for op in ("i2v", "extend", "loop") if op in trained] + ["edit"]


# --- the clips ---


def sample_cases(
    model: Model,
    spec: DiffusionSpec,
    cases: Sequence[Case],
    shape: ClipShape,
    seed: int,
    on_clip: Callable[[int], None],
) -> list[Sampled]:
    """The clip of every case that the shape can hold; case i has the noise of (seed, i) whatever the run."""
    plain = [case for case in cases if case.op == "t2v"]
    with torch.no_grad():
        clips = sample_clips(
            model.model,
            model.vae,
            spec,
            [case.prompt for case in plain],
            shape,
            seed=seed,
            on_batch=on_clip,
        )
        found = [Sampled(case, clip, shape.fps) for case, clip in zip(plain, clips, strict=True)]
        for number, case in enumerate(case for case in cases if case.op != "t2v"):
            made = _conditioned(model, spec, case, shape, seed + 1 + number)
            found += [made] if made else []
            on_clip(len(plain) + number + 1)
    return found


def _conditioned(
    model: Model, spec: DiffusionSpec, case: Case, shape: ClipShape, seed: int
) -> Sampled | None:
    """None where a clip of the shape leaves nothing to make."""
    factor = model.vae.temporal_factor
    num_frames = model.vae.latent_shape(shape.frames, shape.height, shape.width)[1]
    conditions = conditions_of(case, num_frames)
    if conditions is None:
        return None
    (clip,) = sample_clips(
        model.model,
        model.vae,
        spec,
        [case.prompt],
        shape,
        seed=seed,
        condition_frames=conditions,
    )
    if case.op == "edit":
        return Sampled(case, clip, shape.fps)
    known = pixel_mask(conditions.kind, conditions.mask_T, factor).numpy() > 0
    given, kept = conditions.pixels[known], clip[known]
    seams: tuple[int, ...] = ()
    if case.op == "extend":
        # As `sora sample` hands it on: what was given stays as it was.
        clip = np.where(known[:, None, None, None], conditions.pixels, clip)
        seams = (int(known.sum()),)
    if case.op == "loop":
        clip = clip[:-1]
    return Sampled(case, clip, shape.fps, seams=seams, given=given, kept=kept)


def conditions_of(case: Case, num_frames: int) -> ConditionFrames | None:
    """The frames that a case gives, of a clip of so many latent frames; None where that leaves nothing to make."""
    assert case.source is not None
    if case.op == "edit":
        strength_T = torch.full((num_frames,), EDIT_STRENGTH)
        return ConditionFrames(case.source, "t2v", torch.zeros(num_frames), strength_T)
    if kind_for(case.op, num_frames) != case.op:
        return None
    pixels = case.source.copy()
    if case.op == "loop":
        pixels[-1] = pixels[0]
    head = (case.head or max(1, num_frames // 2)) if case.op == "extend" else 1
    mask_T = ends_mask(num_frames, head, int(case.op == "loop"))
    return ConditionFrames(pixels, case.op, mask_T)


# --- the loss ---


def validation(info: CheckpointInfo, model: Model, clips: list[Clip]) -> dict[str, Any]:
    """`val/loss` and its parts, as training measures them on the averaged weights."""
    device = next(model.vae.parameters()).device
    objective = TextToVideoObjective(info.cfg, info.spec, model.vae, device)
    control = ControlPlane(World(0, 1, 0, 1, device))
    return objective.validate(model.model, clips[: info.cfg.validation.max_clips], control)
