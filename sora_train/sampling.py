"""From prompts to clips, during training and after it: one function, one diffusion spec."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sora_train.diffusion.draws import draw_noise
from sora_train.diffusion.sampler import guide, sample_ode
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae import VideoVAE


@dataclass(frozen=True)
class ClipShape:
    """Size of the clips to make, in pixels and frames, and their rate in frames a second."""

    frames: int
    height: int
    width: int
    fps: float


@torch.no_grad()
def sample_clips(
    model: nn.Module,
    vae: VideoVAE,
    spec: DiffusionSpec,
    prompts: list[str],
    shape: ClipShape,
    *,
    seed: int = 0,
    batch: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """One uint8 (T, H, W, 3) clip a prompt.

    Prompt number i starts from noise keyed by (seed, i), so a clip does not depend on how many
    others are made with it. Under a sharded model every rank must call this with the same prompts.
    """
    device = next(vae.parameters()).device
    latent_shape = vae.latent_shape(shape.frames, shape.height, shape.width)
    clips: list[np.ndarray] = []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        keys = [(0, start + i) for i in range(len(chunk))]
        noise = draw_noise(seed, "sample", keys, latent_shape).to(device)
        velocity = guided_velocity(model, chunk, shape.fps, spec.guidance_scale)
        latents = sample_ode(velocity, noise, spec)
        clips += [to_uint8(vae.decode(one[None])[0]) for one in latents]
        if on_batch is not None:
            on_batch(len(clips))
    return clips


def guided_velocity(
    model: nn.Module, prompts: list[str], fps: float, guidance_scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Velocity under classifier-free guidance; the null caption is the encoded empty string."""
    assert isinstance(model, TextToVideo)
    guided = guidance_scale != 1.0
    text = model.tokenize([*prompts, *[""] * len(prompts)] if guided else prompts)

    def velocity(z_BCTHW: Tensor, t_BT: Tensor) -> Tensor:
        copies = 2 if guided else 1
        z, t = z_BCTHW.repeat(copies, 1, 1, 1, 1), t_BT.repeat(copies, 1)
        fps_B = torch.full((len(z),), fps, device=z.device)
        v = model(z, t, text, fps_B=fps_B)
        if not guided:
            return v
        v_prompt, v_null = v.chunk(2)
        return guide(v_prompt, v_null, guidance_scale)

    return velocity


def to_uint8(pixels_CTHW: Tensor) -> np.ndarray:
    """Pixels in [-1, 1], (3, T, H, W) -> uint8 (T, H, W, 3)."""
    scaled = (pixels_CTHW.float().clamp(-1, 1) + 1.0) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
