"""Clips as an objective takes them: their pixels as a tensor, a stand-in where there is none, their stored captions."""

import numpy as np
import torch
from torch import Tensor

from sora_train.data.sample import Clip, ClipBatch
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.vae.pixels import from_uint8


def to_pixels(clips: list[Clip], device: torch.device) -> Tensor:
    """uint8 (T, H, W, 3) clips -> float32 pixels (B, 3, T, H, W) in [-1, 1]."""
    return from_uint8(np.stack([clip.pixels for clip in clips if clip.pixels is not None]), device)


def without_pixels(vae: VideoVAE) -> str:
    """What can be trained on stored latents alone, as the end of a sentence."""
    if vae.causal:
        return "train t2v, i2v and extend with objective.cond_mode=replace only"
    return (
        f"train t2v alone with objective.cond_mode=replace, since in latents of {vae.kind.class_name} the first frames "
        "depend on later ones"
    )


def placeholder(batch: ClipBatch) -> list[Clip]:
    """One black clip for a slot without clips: its gradient is multiplied by zero, its collectives are not."""
    bucket = batch.micro_batch.bucket
    pixels = np.zeros((bucket.frames, bucket.height, bucket.width, 3), np.uint8)
    return [Clip(row=0, epoch=0, pixels=pixels, latents=None, fps=1.0, caption="", digest="")]


def stored_text(clips: list[Clip], prompts: list[str]) -> tuple[Tensor | None, ...]:
    """The stored embeddings of prompts that are still their clip's caption."""
    return tuple(
        None if clip.text is None or prompt != clip.caption else torch.from_numpy(clip.text)
        for clip, prompt in zip(clips, prompts, strict=True)
    )
