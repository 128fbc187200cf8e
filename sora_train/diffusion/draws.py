"""Random draws keyed by sample, so that no rank, worker, batch or order can change them.

The key of a draw is (seed, stream, the sample's own epoch, sample id). Values are drawn in float32
on the CPU at the full sample's shape; the caller casts and slices. Streams in use: "noise",
"timestep", "caption_dropout", "cond_kind", "cond_mask", "cond_dropout", "cond_noise",
"cond_noise_level", "posterior", "sample"; validation has its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sora_train.base.seeding import key_seed

SampleKey = tuple[int, int | str]
"""(epoch, sample id)."""


def generator(seed: int, stream: str, sample: SampleKey) -> torch.Generator:
    """A fresh CPU generator that depends on its arguments alone."""
    return torch.Generator().manual_seed(key_seed(seed, stream, *sample))


def draw_noise(
    seed: int, stream: str, samples: Sequence[SampleKey], shape: Sequence[int]
) -> Tensor:
    """Standard normal values, (B, *shape), float32 on the CPU.

    Row b depends on (seed, stream, samples[b], shape) and on nothing else.
    """
    noise = torch.empty(len(samples), *shape)
    for row, sample in zip(noise, samples, strict=True):
        row.normal_(generator=generator(seed, stream, sample))
    return noise


def draw_uniform(seed: int, stream: str, samples: Sequence[SampleKey]) -> Tensor:
    """One value in [0, 1) a sample, (B,), float32 on the CPU."""
    uniform = torch.empty(len(samples))
    for b, sample in enumerate(samples):
        uniform[b : b + 1].uniform_(generator=generator(seed, stream, sample))
    return uniform
