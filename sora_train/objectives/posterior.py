"""Latents as the VAE's posterior gives them: a mean and a log-variance, and the keyed draw between the two.

Both are standardised by the VAE's own statistics, so that a draw from what is stored needs no VAE:
with raw latents m + s * x, a log-variance loses 2 log s.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sora_train.diffusion.draws import SampleKey, draw_noise
from sora_train.models.vae.autoencoder import VideoVAE


def encode_posterior(vae: VideoVAE, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, as `vae.encode` gives it, and log-variance of standardised latents, (B, C, t, h, w) float32."""
    mean, logvar = vae.encode_moments(pixels)
    unit = torch.ones(1, mean.shape[1], 1, 1, 1, dtype=torch.float64, device=mean.device)
    scale = vae.standardise(unit) - vae.standardise(torch.zeros_like(unit))
    return vae.standardise(mean.float()), logvar.float() + (2 * scale.log()).float()


def draw_latents(mean: Tensor, logvar: Tensor, seed: int, samples: Sequence[SampleKey]) -> Tensor:
    """One draw (B, C, t, h, w) from each posterior, keyed by seed, the sample's epoch and its row."""
    noise = draw_noise(seed, "posterior", samples, mean.shape[1:]).to(mean)
    return mean + (0.5 * logvar).exp() * noise
