"""The discriminator of the autoencoder's adversarial term: is this patch of a clip real, or was it decoded?

A PatchGAN (Isola et al. 2017, arXiv:1611.07004) over space and time: it answers for overlapping patches, so it works on
clips of any length and size, single frames too. Normalised within a sample, never over a batch: its answer for a clip
does not depend on the clips beside it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sora_train.base.seeding import key_seed

GROUPS = 8
MAX_WIDENING = 8


class Discriminator(nn.Module):
    """Clips (B, 3, T, H, W) in [-1, 1] -> logits (B, 1, t, h, w), above zero for real ones.

    Each of `layers` halves height and width, all but the first the frames too; the first has
    `channels`, each further one twice as many up to eight times.
    """

    def __init__(self, channels: int, layers: int, seed: int):
        super().__init__()
        widths = [channels * min(2**i, MAX_WIDENING) for i in range(layers + 1)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key_seed(seed, "discriminator"))
            blocks: list[nn.Module] = [patch(3, widths[0], (1, 2, 2)), nn.LeakyReLU(0.2)]
            for number, (before, after) in enumerate(zip(widths, widths[1:], strict=False), 1):
                stride = (2, 2, 2) if number < layers else (1, 1, 1)
                blocks += [
                    patch(before, after, stride),
                    nn.GroupNorm(GROUPS, after),
                    nn.LeakyReLU(0.2),
                ]
            self.layers = nn.Sequential(*blocks, patch(widths[-1], 1, (1, 1, 1)))

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.layers(pixels)
        return logits


def patch(before: int, after: int, stride: tuple[int, int, int]) -> nn.Conv3d:
    """A convolution over three frames and 4x4 pixels."""
    return nn.Conv3d(before, after, (3, 4, 4), stride, padding=(1, 1, 1))


def smallest_side(layers: int) -> int:
    """Pixels a side that leave at least one patch: `layers` halvings, then two convolutions that take a pixel each."""
    return 3 * 2**layers


def discriminator_loss(real: Tensor, made: Tensor) -> Tensor:
    """Hinge loss (B,) from logits (Lim & Ye 2017, arXiv:1705.02894, eq. 6), half the sum of both sides."""
    return 0.5 * (F.relu(1.0 - real) + F.relu(1.0 + made)).flatten(1).mean(dim=1)


def generator_loss(made: Tensor) -> Tensor:
    """The decoder's side of it (B,): the logits of what it made, to be raised."""
    return -made.flatten(1).mean(dim=1)


def accuracy(real: Tensor, made: Tensor) -> Tensor:
    """Share (B,) of patches judged rightly, real and made ones counting alike."""
    right = [(real > 0).float().flatten(1), (made < 0).float().flatten(1)]
    return 0.5 * torch.stack([part.mean(dim=1) for part in right]).sum(dim=0)
