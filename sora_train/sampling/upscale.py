"""A clip refined in overlapping windows: larger or longer than the model was trained for, in memory of one window.

The resized clip is noised a little and made anew from there (SDEdit, Meng et al. 2021, arXiv:2108.01073). At every
step each window's velocity is asked for by itself, and where windows overlap the velocities are averaged
(MultiDiffusion, Bar-Tal et al. 2023, arXiv:2302.08113), so neighbours agree before they can differ. A window weighs
less towards its borders; the weights of all windows add up to 1 everywhere.

Dimension key: B batch, C channels, T, H, W latent frames, rows, columns, of the clip or of a window.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_train.models.vae.autoencoder import VideoVAE

Velocity = Callable[[Tensor, Tensor], Tensor]
Place = tuple[slice, slice, slice]
WHOLE: Place = (slice(None), slice(None), slice(None))
VelocityAt = Callable[[Tensor, Tensor, Place], Tensor]


@dataclass(frozen=True)
class Axis:
    """Windows along one axis: where each begins, and how much each of its places counts."""

    starts: tuple[int, ...]
    weights: Tensor
    """(windows, places of a window); those of one place of the clip add up to 1."""

    @property
    def parts(self) -> list[slice]:
        """Places of the clip that each window holds."""
        length = self.weights.shape[1]
        return [slice(start, start + length) for start in self.starts]


def axis_of(length: int, window: int, overlap: int, step: int = 1) -> Axis:
    """Windows that cover `length` places, spread evenly, neighbours sharing `overlap` or more; one where it is enough.

    Args:
        step: windows begin at its multiples; `length` and `window` are some.

    Raises:
        ValueError: windows that would not move on.
    """
    window = min(window, length)
    if length > window and overlap + step > window:
        raise ValueError(f"windows of {window} that share {overlap} do not move on by {step}")
    # Whole steps, of which neighbours are never further apart than the overlap allows.
    room, stride = (length - window) // step, max(1, (window - overlap) // step)
    count = math.ceil(room / stride)
    starts = tuple(step * (i * room // max(1, count)) for i in range(count + 1))
    rise = torch.arange(1, window + 1, dtype=torch.float64).clamp_max(max(1, overlap))
    hat = torch.minimum(rise, rise.flip(0))
    total = torch.zeros(length, dtype=torch.float64)
    for start in starts:
        total[start : start + window] += hat
    return Axis(starts, torch.stack([hat / total[start : start + window] for start in starts]))


class Windows:
    """All windows of a clip; each is one of every axis."""

    def __init__(self, axes: Sequence[Axis]):
        self.axes = tuple(axes)

    @classmethod
    def over(
        cls, latent_size: Sequence[int], window: Sequence[int], patch: Sequence[int]
    ) -> "Windows":
        """Windows of (t, h, w) = `window` over latents of `latent_size`, a quarter of each shared, in whole patches."""
        return cls(
            [
                axis_of(length, size, min(size, length) // 4, step)
                for length, size, step in zip(latent_size, window, patch, strict=True)
            ]
        )

    @property
    def count(self) -> int:
        return math.prod(len(axis.starts) for axis in self.axes)

    def first(self) -> Place:
        """The window at the beginning; all are of its size."""
        frames, rows, columns = (axis.parts[0] for axis in self.axes)
        return frames, rows, columns

    def __iter__(self) -> Iterator[tuple[Place, Tensor]]:
        """Each window's place, and the weight of each of its latents (T, H, W)."""
        pairs = [zip(axis.parts, axis.weights, strict=True) for axis in self.axes]
        for (frames, t), (rows, h), (columns, w) in itertools.product(*pairs):
            yield (frames, rows, columns), t[:, None, None] * h[:, None] * w

    def seams(self, axis: int) -> list[int]:
        """Places of an axis where one window begins to count or the one before ends."""
        starts, length = self.axes[axis].starts, self.axes[axis].weights.shape[1]
        ends = [start + length for start in starts[:-1]]
        return sorted({*starts[1:], *ends})

    def blend(self, velocity: VelocityAt) -> Velocity:
        """The velocity of a whole clip from that of one window, which is told its place."""

        def blended(z: Tensor, t_BT: Tensor) -> Tensor:
            total = torch.zeros_like(z)
            for (frames, rows, columns), weight in self:
                place = (frames, rows, columns)
                v = velocity(z[(..., *place)].contiguous(), t_BT[:, frames], place)
                total[(..., *place)] += v.to(z) * weight.to(z)
            return total

        return blended


@contextlib.contextmanager
def in_tiles(vae: VideoVAE, windows: Windows | None) -> Iterator[None]:
    """Have the VAE work on a window's size at a time where the model does; a size of its own holds."""
    own = vae.tile
    if windows is not None and not own:
        rows, columns = (axis.weights.shape[1] for axis in windows.axes[1:])
        vae.use_tiles(max(rows, columns) * vae.spatial_factor)
    try:
        yield
    finally:
        if vae.tile != own:
            vae.use_tiles(own)
