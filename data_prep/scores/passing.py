"""One pass over a clip: small frames shown to those who watch, and a few pictures at full size.

Whatever the clip's length, no more than these few pictures and what the watchers keep is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_prep.media.reading import frames_between, picture, small_picture
from sora_train.evaluation.detectors.opencv import grey_of, limited

SHORT_SIDE = 144
"""Pixels of the shorter side of a small frame: the unit in which motion is measured is this side."""
LONGEST_SIDE = 576
LARGEST_SAMPLE = 1280
"""Pixels of the longer side of a picture at full size; larger ones are scaled down to it."""
MOMENTS = 3
"""Places in a clip at which pictures are taken, two at each: one, and one a little later."""
LATER_SECONDS = 0.5
TICKS = 8.0
"""Small frames a second that motion is measured between, whatever the clip's frame rate."""


@dataclass(frozen=True)
class SmallFrame:
    """A frame whose shorter side has SHORT_SIDE pixels."""

    time: float
    seconds: float
    """How long it is shown."""
    rgb: np.ndarray
    """uint8 (H, W, 3)."""
    grey: np.ndarray
    """uint8 (H, W): luma."""
    is_tick: bool
    """Whether it is one of the TICKS a second."""


class Watcher(Protocol):
    """Sees every small frame in order, then says its scores."""

    def see(self, frame: SmallFrame) -> None: ...

    def scores(self) -> dict[str, Any]: ...


def watch(file: Any, row: Mapping[str, Any], watchers: Sequence[Watcher]) -> list[np.ndarray]:
    """Show a clip's frames to the watchers; return 2 * MOMENTS pictures, uint8 (H, W, 3) RGB, in order of time.

    Raises BadClip where the file is damaged.
    """
    wanted = sample_times(row["duration"])
    samples: list[np.ndarray] = []
    next_tick = -1.0
    for time, seconds, frame in frames_between(
        file, 0.0, row["duration"] + 1.0, row["traits"], row["start"], row["fps"], is_seekable=True
    ):
        is_tick = time >= next_tick - seconds / 2
        if is_tick:
            next_tick = max(next_tick + 1 / TICKS, time + 0.5 / TICKS)
        if watchers:
            small = small_frame(frame, time, seconds, is_tick)
            for watcher in watchers:
                watcher.see(small)
        due = sum(moment < time + seconds + 1e-6 for moment in wanted) - len(samples)
        if due > 0:
            samples += [limited(picture(frame), LARGEST_SAMPLE)] * due
    # A clip may end before what its container says.
    return samples + [limited(picture(frame), LARGEST_SAMPLE)] * (len(wanted) - len(samples))


def sample_times(duration: float) -> list[float]:
    """Seconds: MOMENTS in the middle of equal parts of a clip, each followed by one LATER_SECONDS after it or less."""
    part = duration / MOMENTS
    later = min(LATER_SECONDS, part / 2)
    return [(k + 0.5) * part + after for k in range(MOMENTS) for after in (-later / 2, later / 2)]


def small_frame(frame: Any, time: float, seconds: float, is_tick: bool) -> SmallFrame:
    height, width = small_size(frame.height, frame.width)
    rgb = np.ascontiguousarray(small_picture(frame, height, width))
    return SmallFrame(time, seconds, rgb, grey_of(rgb), is_tick)


def small_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of a small frame: even numbers, of about the same shape."""
    scale = SHORT_SIDE / min(height, width)
    small_height, small_width = (
        min(LONGEST_SIDE, max(2, round(side * scale / 2) * 2)) for side in (height, width)
    )
    return small_height, small_width


def all_scores(watchers: Iterable[Watcher]) -> dict[str, Any]:
    return {name: value for watcher in watchers for name, value in watcher.scores().items()}
