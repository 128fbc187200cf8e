"""Random draws keyed by sample, so that no rank, worker, batch or order can change them.

The key of a draw is (seed, stream, the sample's own epoch, sample id). Values are drawn in float32
on the CPU at the full sample's shape; the caller casts and slices. Streams in use: "noise",
"timestep", "caption_dropout", "cond_kind", "cond_mask", "cond_dropout", "cond_noise",
"cond_noise_level", "frame_noise", "frame_timestep", "posterior", "sample"; validation has its own.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sora_train.base.seeding import key_seed

SampleKey = tuple[int, int | str]
"""(epoch, sample id)."""


DRAWS = "pcg64"
"""The generator behind all draws, by name; every checkpoint says by which one it was trained."""
OLDEST_DRAWS = "mt19937"
"""That of checkpoints that do not say: torch's on the CPU, which takes 32 bits of a key."""


def generator(seed: int, stream: str, sample: SampleKey) -> np.random.Generator:
    """A fresh generator that depends on its arguments alone, and on all 63 bits of their key."""
    return np.random.Generator(np.random.PCG64(key_seed(seed, stream, *sample)))


def draw_noise(
    seed: int,
    stream: str,
    samples: Sequence[SampleKey],
    shape: Sequence[int],
    *,
    pinned: bool = False,
) -> Tensor:
    """Standard normal values, (B, *shape), float32 on the CPU; `pinned` in memory that a GPU reads by itself.

    Row b depends on (seed, stream, samples[b], shape) and on nothing else.
    """
    noise = torch.empty(len(samples), *shape, pin_memory=pinned)
    for row, sample in zip(noise, samples, strict=True):
        generator(seed, stream, sample).standard_normal(dtype=np.float32, out=row.numpy())
    return noise


def draw_uniforms(seed: int, stream: str, samples: Sequence[SampleKey], count: int) -> Tensor:
    """`count` values in [0, 1) a sample, (B, count), float32 on the CPU."""
    rows = [generator(seed, stream, one).random(count, dtype=np.float32) for one in samples]
    return torch.from_numpy(np.stack(rows))


def draw_uniform(seed: int, stream: str, samples: Sequence[SampleKey]) -> Tensor:
    """One value in [0, 1) a sample, (B,), float32 on the CPU."""
    return torch.tensor(
        [generator(seed, stream, sample).random(dtype=np.float32) for sample in samples],
        dtype=torch.float32,
    )
