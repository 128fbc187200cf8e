"""Text alignment, measured: the shapes oracle reads the clips and compares them with their prompts."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from sora_train.base.progress import Progress
from sora_train.data.sample import Clip
from sora_train.data.shapes.oracle import CHANCE, score
from sora_train.data.shapes.world import Prompt, eval_prompts, render, scene_of
from sora_train.objectives import to_pixels
from sora_train.sampling.pipeline import ClipShape, sample_clips, to_uint8
from sora_train.training.outputs.samples import sample_shape

if TYPE_CHECKING:
    from sora_train.training.trainer import Trainer

Scores = dict[str, float]


def oracle_scores(trainer: "Trainer") -> dict[str, Scores]:
    """Scores on prompts of seen and of held-out combinations, chance, and two ceilings.

    `ceiling_clean` is the oracle on rendered clips of the same prompts, `ceiling_vae` on the VAE's
    reconstructions of them: what a perfect model could reach.
    """
    cfg = trainer.cfg
    count, shape = cfg.sample.oracle_prompts, sample_shape(cfg, trainer.data)
    scores: dict[str, Scores] = {}
    prompts = {
        name: eval_prompts(count, held_out=held_out)
        for name, held_out in (("seen", False), ("held_out", True))
    }
    for name, asked in prompts.items():
        scores[name] = score(sampled(trainer, asked, shape, name), asked)
    everything = [*prompts["seen"], *prompts["held_out"]]
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
    scores["ceiling_clean"] = score(clean, everything)
    scores["ceiling_vae"] = score([reconstruct(trainer, clip) for clip in clean], everything)
    return scores


def sampled(
    trainer: "Trainer", prompts: list[Prompt], shape: ClipShape, name: str
) -> list[np.ndarray]:
    model = trainer.engine.model
    with Progress(
        len(prompts), f"sampling {name} prompts", enabled=trainer.world.is_main
    ) as progress:
        return sample_clips(
            model,
            trainer.vae,
            trainer.spec,
            [prompt.text for prompt in prompts],
            shape,
            seed=trainer.cfg.sample.seed,
            batch=32,
            on_batch=progress.update,
            on_step=lambda _: trainer.health.check_preemption(),
        )


@torch.no_grad()
def reconstruct(trainer: "Trainer", clip: np.ndarray) -> np.ndarray:
    """What the VAE makes of a clip, uint8 (T, H, W, 3)."""
    row = Clip(row=0, epoch=0, pixels=clip, latents=None, fps=1.0, caption="", digest="")
    return to_uint8(
        trainer.vae.decode(trainer.vae.encode(to_pixels([row], trainer.world.device)))[0]
    )
