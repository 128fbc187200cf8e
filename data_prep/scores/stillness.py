"""Frames that show nothing new: black ones, frozen stretches, and frames equal to the one before."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_prep.scores.passing import SmallFrame
from sora_train.evaluation.detectors.opencv import opencv

BLOCK = 8
"""Pixels: a change is looked for in squares of this side, since something small may move."""
CODEC_NOISE = 4.0
"""Levels of 255 by which the worst square of a still picture may differ after coding; measured up to CRF 34 of x264."""
STRETCH_SECONDS = 0.5
"""Within a stretch of this length in which nothing changes every frame is a duplicate."""
NEAR, DIP = 8, 0.25
"""Elsewhere a duplicate changes less than DIP of the larger changes among NEAR frames before it, and behind it."""
BLACK_LEVEL, BLACK_SHARE = 0.10, 0.98
"""A frame is black where this share of it is darker than this luma: the values of FFmpeg's `blackdetect`."""


class Stillness:
    """`black`: share of the time in which the frame is black. `frozen`: the longest stretch in which nothing changes,
    as a share of the clip. `duplicate_frames`: share of the frames that are equal to the one before. All in [0, 1].
    """

    def __init__(self) -> None:
        self._before: SmallFrame | None = None
        self._first: SmallFrame | None = None
        self._stretch: list[int] = []
        self._seconds = self._black = self._longest = 0.0
        self._changes: list[float] = []
        self._is_in_stretch: list[bool] = []

    def see(self, frame: SmallFrame) -> None:
        self._seconds += frame.seconds
        if (frame.grey < BLACK_LEVEL * 255).mean() >= BLACK_SHARE:
            self._black += frame.seconds
        if self._before is not None:
            self._changes.append(change(self._before.grey, frame.grey))
            self._is_in_stretch.append(False)
        self._before = frame
        # From the first of a stretch, so that slow movements add up.
        if self._first is None or change(self._first.grey, frame.grey) > CODEC_NOISE:
            self._first, self._stretch = frame, []
            return
        self._stretch.append(len(self._changes) - 1)
        length = frame.time + frame.seconds - self._first.time
        self._longest = max(self._longest, length)
        if length >= STRETCH_SECONDS:
            while self._stretch:
                self._is_in_stretch[self._stretch.pop()] = True

    def scores(self) -> dict[str, Any]:
        found = dips(np.array(self._changes)) | np.array(self._is_in_stretch, bool)
        return {
            "black": self._black / self._seconds,
            "frozen": min(1.0, self._longest / self._seconds),
            "duplicate_frames": float(found.mean()) if len(found) else 0.0,
        }


def dips(changes: np.ndarray) -> np.ndarray:
    """Which changes from frame to frame, (N,), are codec noise between larger ones: bool (N,)."""
    found = np.zeros(len(changes), bool)
    for n, change_here in enumerate(changes):
        sides = changes[max(0, n - NEAR) : n], changes[n + 1 : n + 1 + NEAR]
        # The second largest: a single jump, as at a key frame, is not how the picture moves.
        usual = [np.sort(side)[-2] for side in sides if len(side) > 1]
        found[n] = bool(usual) and change_here <= min(CODEC_NOISE, DIP * min(usual))
    return found


def change(before: np.ndarray, after: np.ndarray) -> float:
    """The mean difference in the square that changes most, in levels of 255, of two grey frames uint8 (H, W)."""
    cv2 = opencv()
    difference = cv2.absdiff(before, after)
    size = max(1, before.shape[1] // BLOCK), max(1, before.shape[0] // BLOCK)
    return float(
        cv2.resize(difference.astype(np.float32), size, interpolation=cv2.INTER_AREA).max()
    )
