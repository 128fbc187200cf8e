"""Text alignment, measured: the shapes oracle reads the clips and compares them with their prompts."""

import numpy as np
import torch

from sora_train.base.progress import Progress
from sora_train.data.index.sources import new_colour
from sora_train.data.shapes.oracle import CHANCE, score
from sora_train.data.shapes.scene import Prompt
from sora_train.data.shapes.world import COLOURS, PALETTE, eval_prompts, render, scene_of
from sora_train.models.adapters.inject import base_alone
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.vae.pixels import from_uint8, to_uint8
from sora_train.sampling.pipeline import ClipShape, sample_clips
from sora_train.training.components import Components
from sora_train.training.outputs.samples import sample_shape
from sora_train.training.run import RunContext

Scores = dict[str, float]


def oracle_scores(run: RunContext, parts: Components) -> dict[str, Scores]:
    """Scores on prompts of seen and of held-out combinations, chance, and two ceilings; of a run that trains a new
    colour on prompts of that too, and of an adapter's run those of its base alone beside them.

    `ceiling_clean` is the oracle on rendered clips of the same prompts, `ceiling_vae` on the VAE's
    reconstructions of them: what a perfect model could reach.
    """
    count, shape = run.cfg.sample.oracle_prompts, sample_shape(run.cfg, parts.data)
    colour = new_colour(run.cfg.data)
    palette = PALETTE if colour else COLOURS
    prompts = {"new": eval_prompts(count, held_out=False, colour=colour)} if colour else {}
    prompts |= {
        name: eval_prompts(count, held_out=held_out)
        for name, held_out in (("seen", False), ("held_out", True))
    }
    scores: dict[str, Scores] = {}
    for name, asked in prompts.items():
        scores[name] = score(sampled(run, parts, asked, shape, name), asked, palette)
    if run.cfg.adapter.on:
        with base_alone(parts.engine.model):
            for name, asked in prompts.items():
                clips = sampled(run, parts, asked, shape, f"{name} (base)")
                scores[f"{name} (base)"] = score(clips, asked, palette)
    everything = [prompt for asked in prompts.values() for prompt in asked]
    clean = [
        render(
            scene_of(
                prompt,
                seed,
                num_frames=shape.frames,
                fps=shape.fps,
                height=shape.height,
                width=shape.width,
            )
        )
        for seed, prompt in enumerate(everything)
    ]
    scores["chance"] = dict(CHANCE)
    scores["ceiling_clean"] = score(clean, everything, palette)
    rebuilt = [reconstruct(parts.vae, clip) for clip in clean]
    scores["ceiling_vae"] = score(rebuilt, everything, palette)
    return scores


def sampled(
    run: RunContext, parts: Components, prompts: list[Prompt], shape: ClipShape, name: str
) -> list[np.ndarray]:
    assert parts.spec is not None
    with Progress(len(prompts), f"sampling {name} prompts", enabled=run.is_main) as progress:
        return sample_clips(
            parts.engine.model,
            parts.vae,
            parts.spec,
            [prompt.text for prompt in prompts],
            shape,
            seed=run.cfg.sample.seed,
            batch=32,
            on_batch=progress.update,
            on_step=lambda _: run.health.check_preemption(),
        )


@torch.no_grad()
def reconstruct(vae: VideoVAE, clip: np.ndarray) -> np.ndarray:
    """What the VAE makes of a clip, uint8 (T, H, W, 3)."""
    device = next(vae.parameters()).device
    return to_uint8(vae.decode(vae.encode(from_uint8(clip[None], device)))[0])
