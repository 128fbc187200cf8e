"""A window joined to the frames it continues: in colour and exposure, and in every pixel at the border.

Every window is encoded, sampled and decoded anew, and each time a little contrast is lost; over sixty windows that is
seen. The frames a window was shown come back from it too, so what became of them says what to undo: for each channel
the gain and the shift that give them their mean and deviation again. What is then left of the last of them, pixel by
pixel, is a step that everybody would see at the border, since all of it comes at once: it is added to the new frames,
less with each.
"""

from dataclasses import dataclass

import numpy as np

GAINS = (0.9, 1.1)
"""Within these a gain is drift; what is beyond is another scene."""
FADE = 4
"""New frames over which the rest fades."""


@dataclass(frozen=True)
class Match:
    """x -> gain * x + shift for each channel, (3,) each."""

    gain: np.ndarray
    shift: np.ndarray

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 (..., 3), matched."""
        if (self.gain == 1).all() and (self.shift == 0).all():
            return frames
        matched = frames * self.gain.astype(np.float32) + self.shift.astype(np.float32)
        return np.clip(np.rint(matched), 0, 255).astype(np.uint8)


def match(made: np.ndarray, wanted: np.ndarray) -> Match:
    """What gives `made` the mean and the deviation of `wanted` in each channel, both uint8 (F, H, W, 3)."""
    axes = tuple(range(made.ndim - 1))
    mean, goal = made.mean(axes, np.float64), wanted.mean(axes, np.float64)
    spread, wide = made.std(axes, np.float64), wanted.std(axes, np.float64)
    gain = np.clip(wide / np.maximum(spread, 1e-6), *GAINS)
    # A channel without detail has no contrast to restore.
    gain = np.where(spread < 1, 1.0, gain)
    return Match(gain, goal - gain * mean)


def joined(made: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """The new frames of a window `made` (F, H, W, 3), uint8, which begins with the frames that are `shown`."""
    count = len(shown)
    matched = match(made[:count], shown)(made)
    rest = shown[-1].astype(np.float32) - matched[count - 1]
    fresh = matched[count:].astype(np.float32)
    kept = np.arange(FADE, 0, -1, dtype=np.float32)[: len(fresh)] / (FADE + 1)
    fresh[: len(kept)] += kept[:, None, None, None] * rest
    return np.clip(np.rint(fresh), 0, 255).astype(np.uint8)
