"""How noise levels are drawn in training and spaced in sampling.

Each law is the inverse of a distribution function applied to a uniform draw u in [0, 1): a keyed u
gives a keyed t, and all laws rise with u. t = 0 is data, t = 1 is noise."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TIME_LAWS = ("uniform", "logit_normal", "mode")
SHIFT_RULES = ("constant", "resolution")


def uniform(u: Tensor) -> Tensor:
    """t = u."""
    return u


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """logit(t) is normal with `mean` and `std` (Esser et al. 2024, arXiv:2403.03206, eq. 19)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode(u: Tensor, scale: float) -> Tensor:
    """Mode sampling with heavy tails (arXiv:2403.03206, eq. 20), written for 1 - u so that it rises
    with u.

    It is monotone for -1 <= scale <= 2 / (pi - 2), about 1.75.
    """
    return u - scale * (torch.sin(math.pi / 2 * u).square() - u)


def shift_t(t: Tensor, shift: float) -> Tensor:
    """t' = s * t / (1 + (s - 1) * t): the noise level that looks alike at s times the resolution
    (arXiv:2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_factor(latent_size: Sequence[int]) -> float:
    """How much further a larger clip shifts: a line through 1 at 256 tokens a frame and 3 at 4096,
    times the root of the latent frames.

    The rule of Open-Sora 2.0 (arXiv:2503.09642) and, for one frame, of FLUX. Tokens are counted in
    patches of 2x2 latents, on which the rule was tuned, whatever the model's own patch is.

    Args:
        latent_size: (t, h, w) of the latents.
    """
    num_frames, num_rows, num_columns = latent_size
    tokens = num_rows * num_columns / 4
    return (1 + 2 * (tokens - 256) / (4096 - 256)) * math.sqrt(num_frames)


def sampling_times(num_steps: int, shift: float) -> Tensor:
    """The sampler's grid from 1 to 0, (num_steps + 1,), float64: even steps, shifted as in
    training."""
    return shift_t(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)
