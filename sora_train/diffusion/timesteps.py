"""How noise levels are drawn in training and spaced in sampling.

Each law is the inverse of a distribution function applied to a uniform draw u in [0, 1): a keyed u
gives a keyed t, and all laws rise with u. t = 0 is data, t = 1 is noise."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

TIME_LAWS = ("uniform", "logit_normal", "mode")
SHIFT_RULES = ("constant", "resolution", "frame", "length", "root")
WEIGHTINGS = ("uniform", "cosmap", "min_snr")
TIME_GRIDS = ("even", "unipc", "flow_match_euler")
TIME_ROUNDINGS = ("none", "truncate")
TRAIN_STEPS = 1000
"""Into how many timesteps diffusers' schedulers divide the path; nothing here but their grids does."""


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


def shift_factor(rule: str, latent_size: Sequence[int]) -> float:
    """How much further a clip shifts than its config says, by its tokens a frame and its length.

    A larger or longer clip says the same thing more often, so it takes more noise to hide it.
    Tokens are counted in patches of 2x2 latents, on which the rules were tuned, whatever the
    model's own patch is.

    Args:
        rule: `constant`: 1. `frame`: a line through 1 at 256 tokens a frame and 3 at 4096 (FLUX's,
            in the form of Open-Sora 2.0, arXiv:2503.09642). `length`: the root of the latent
            frames. `resolution`: `frame` times `length`, which is Open-Sora 2.0's rule. `root`: the
            root of tokens a frame over 1024, by which noise of that many tokens looks alike
            (arXiv:2403.03206, eq. 23), times `length`, which is Open-Sora 1.2's.
        latent_size: (t, h, w) of the latents.

    Raises:
        ValueError: unknown rule.
    """
    num_frames, num_rows, num_columns = latent_size
    tokens = num_rows * num_columns / 4
    frame = 1 + 2 * (tokens - 256) / (4096 - 256)
    length = math.sqrt(num_frames)
    match rule:
        case "constant":
            return 1.0
        case "frame":
            return frame
        case "length":
            return length
        case "resolution":
            return frame * length
        case "root":
            return math.sqrt(tokens / 1024) * length
    raise ValueError(f"shift rule '{rule}' is unknown; choose among {', '.join(SHIFT_RULES)}")


def share_below(law: Callable[[Tensor], Tensor], t: float) -> float:
    """The u at which a law that rises with u reaches t, to the last digit: how much of its draws lies below t.

    Args:
        law: from uniform draws (1,), float64, to noise levels.
    """
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        if float(law(torch.tensor([middle], dtype=torch.float64))) < t:
            low = middle
        else:
            high = middle
    return high


def high_noise(u: Tensor, share: float, start: float) -> tuple[Tensor, Tensor]:
    """Splits a uniform draw between the law of the config and a share of nearly pure noise.

    Samples start from pure noise, which a logit-normal law hardly ever shows. Cosmos-Predict2.5
    (its published code) draws 5 % of the clips from the noisiest 0.5 % of the path.

    Args:
        u: uniform draws in [0, 1).
        share: how much of them goes to high noise.
        start: high noise is uniform in [start, 1).

    Returns:
        (v, t): v is uniform in [0, 1) for the law, wherever t is NaN; elsewhere t is the noise
        level.
    """
    kept = 1.0 - share
    high = start + (1.0 - start) * (u - kept) / max(share, 1e-12)
    return u / max(kept, 1e-12), torch.where(u < kept, torch.full_like(u, math.nan), high)


def loss_weight(weighting: str, t: Tensor, min_snr_gamma: float) -> Tensor:
    """Factor on the velocity's squared error at noise level t.

    Args:
        weighting: `uniform`: 1. `cosmap`: 2 / (pi (1 - 2 t + 2 t^2)), flat in the log of the
            signal-to-noise ratio under a cosine schedule (arXiv:2403.03206, section 3.1). `min_snr`:
            min((1 - t)^2, gamma t^2), which is min(snr, gamma) on the error of the data (Hang et al.
            2023, arXiv:2303.09556, eq. 7) with snr = ((1 - t) / t)^2 and x's error = t times v's.
        t: noise levels of any shape.
        min_snr_gamma: gamma of `min_snr`.

    Raises:
        ValueError: unknown weighting.
    """
    match weighting:
        case "uniform":
            return torch.ones_like(t)
        case "cosmap":
            return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))
        case "min_snr":
            return torch.minimum((1 - t).square(), min_snr_gamma * t.square())
    raise ValueError(f"weighting '{weighting}' is unknown; choose among {', '.join(WEIGHTINGS)}")


def sampling_times(num_steps: int, shift: float, grid: str) -> Tensor:
    """The sampler's grid from 1 to 0, (num_steps + 1,), float64.

    Args:
        grid: `even`: even steps, shifted as in training. The others are those of diffusers'
            schedulers, number for number. `unipc` (`UniPCMultistepScheduler` with
            `use_flow_sigmas`): even steps towards 1/1000, the last of them left out, shifted, and
            1e-6 (in float32) below pure noise at first. `flow_match_euler` (`FlowMatchEulerDiscreteScheduler`):
            even steps to the shifted 1/1000, and that is shifted once more.

    Raises:
        ValueError: unknown grid.
    """
    # numpy's arithmetic is the schedulers', to the last digit; where times are cut off, it counts.
    match grid:
        case "even":
            return shift_t(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)
        case "unipc":
            times = np.linspace(1, 1 / TRAIN_STEPS, num_steps + 1)[:-1]
            times = shift * times / (1 + (shift - 1) * times)
            times[0] = np.float32(1 - 1e-6)
        case "flow_match_euler":
            first = np.float32(1 / TRAIN_STEPS)
            lowest = np.float32(shift * first / (1 + (shift - 1) * first))
            times = np.linspace(TRAIN_STEPS, float(lowest) * TRAIN_STEPS, num_steps) / TRAIN_STEPS
            times = shift * times / (1 + (shift - 1) * times)
        case _:
            raise ValueError(f"time grid '{grid}' is unknown; choose among {', '.join(TIME_GRIDS)}")
    return torch.from_numpy(np.append(times, 0.0))


def shown_time(t: float, rounding: str) -> float:
    """The noise level that the model gets at time t of the grid.

    Args:
        rounding: `none`: t. `truncate`: down to a whole thousandth, as diffusers'
            `UniPCMultistepScheduler` cuts its timesteps off to integers.
    """
    return t if rounding == "none" else int(t * TRAIN_STEPS) / TRAIN_STEPS
