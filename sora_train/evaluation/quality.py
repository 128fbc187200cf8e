"""How near a clip is to its original: peak signal-to-noise ratio and structural similarity.

Pixels are (B, 3, T, H, W) in [-1, 1]; every clip gets one number, the mean over its frames for the
similarity, of the whole clip for the ratio.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

RANGE = 2.0
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Decibels (B,): -10 log10 of the mean squared error over the squared range; 100 at most."""
    mse_B = (a - b).square().flatten(1).mean(dim=1) / RANGE**2
    return -10 * mse_B.clamp_min(1e-10).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (B,), 1 for equal clips (Wang et al. 2004, IEEE Trans. Image Processing
    13(4), equation 13).

    As published: a Gaussian window of 11 pixels and deviation 1.5, where it lies wholly inside the
    frame, here on each colour; a frame smaller than the window takes one as large as fits.
    """
    clips = len(a)
    size = min(WINDOW, *a.shape[-2:])
    x, y = (rearrange(clip.double(), "b c t h w -> (b c t) 1 h w") for clip in (a, b))
    at = torch.arange(size, dtype=torch.float64, device=a.device) - (size - 1) / 2
    weights = torch.exp(-at.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()

    def local_mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))

    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x = local_mean(x.square()) - mean_x.square()
    var_y = local_mean(y.square()) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    return similarity.reshape(clips, -1).mean(dim=1)
