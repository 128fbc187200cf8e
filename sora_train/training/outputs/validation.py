"""Validation during a run: what the objective measures on the held-out clips, and what sampled clips are like."""

import sys

import numpy as np

from sora_train.data.shapes.world import eval_prompts
from sora_train.evaluation.cases import asked_by
from sora_train.evaluation.measures import moving, shown
from sora_train.evaluation.registry import METRICS
from sora_train.sampling.pipeline import NoPicture, sample_clips
from sora_train.training.components import Components
from sora_train.training.outputs.samples import sample_prompts, sample_shape
from sora_train.training.pipeline.release import encoders_at_hand
from sora_train.training.run import RunContext


def validate(run: RunContext, parts: Components) -> dict[str, float]:
    """Metrics of the averaged weights on held-out clips, and of clips sampled with them. A collective.

    With `validation.live` also `val/live/loss`, that of the weights as they are trained.
    """
    if run.cfg.validation.every == 0:
        return {}
    model = parts.engine.model
    model.eval()
    try:
        with run.health.phase("validation"):
            return on_held_out(run, parts) | on_sampled(run, parts)
    finally:
        model.train()


def on_held_out(run: RunContext, parts: Components) -> dict[str, float]:
    clips, model, objective = parts.data.val_clips, parts.engine.model, parts.objective
    if not clips:
        return {}
    with parts.averaged():
        row = objective.validate(model, clips, run.control, run.health.check_preemption)
    if row and run.cfg.validation.live:
        live = objective.validate(model, clips, run.control, run.health.check_preemption, live=True)
        if "val/loss" in live:
            row["val/live/loss"] = live["val/loss"]
    return row


def on_sampled(run: RunContext, parts: Components) -> dict[str, float]:
    """`val/clips/*`: means over `validation.clips` clips of fixed prompts and noise, every rank computing."""
    cfg, spec = run.cfg, parts.spec
    if cfg.validation.clips == 0 or spec is None or parts.model is None:
        return {}
    shapes = cfg.data.source.partition(":")[0] == "shapes"
    prompts = (
        [prompt.text for prompt in eval_prompts(cfg.validation.clips, held_out=False)]
        if shapes
        else sample_prompts(cfg, parts.data)[: cfg.validation.clips]
    )
    shape = sample_shape(cfg, parts.data)
    try:
        with (
            encoders_at_hand(parts.vae, parts.model, run.world.device),
            parts.averaged(),
        ):
            clips = sample_clips(
                parts.engine.model,
                parts.vae,
                spec,
                prompts,
                shape,
                seed=cfg.sample.seed,
                on_step=lambda _: run.health.check_preemption(),
            )
    except NoPicture as error:
        # Training goes on: its own guards see to weights that diverge.
        if run.is_main:
            print(f"no clips are judged: {error}", file=sys.stderr, flush=True)
        return {}
    asked = [asked_by(prompt) if shapes else None for prompt in prompts]
    rows = [
        moving(clip, shape.fps) | (shown(clip, one) if one else {})
        for clip, one in zip(clips, asked, strict=True)
    ]
    return {
        f"val/clips/{name}": float(np.mean([_size(name, row[name]) for row in rows]))
        for name in (rows[0] if rows else {})
    }


def _size(name: str, value: float) -> float:
    """Slopes up and down must not cancel."""
    return abs(value) if METRICS[name].better == "zero" else value
