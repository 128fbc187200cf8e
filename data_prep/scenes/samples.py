"""A source as small pictures at an even rate, numbered from its first frame, from wherever it is begun to be read.

Containers give frames at any times; what looks for scenes wants equal steps, and has to see the same steps in whichever
parts a source is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.media.reading import frames_between, small_picture
from sora_train.evaluation.detectors.transnet import HEIGHT, WIDTH

MAX_RATE = 31.0
_SLACK = 0.25
"""Share of a step that a frame may come early: containers round times."""


@dataclass(frozen=True)
class Sample:
    """What is shown at the end of step `number`.

    `time` is in seconds after the source's first frame: of the frames that came since the sample before, the one that
    differs most from its predecessor.
    """

    number: int
    time: float
    picture: np.ndarray
    """uint8 (27, 48, 3) RGB."""


def rate_of(fps: float) -> float:
    """Samples a second: every frame, or of fast ones every second, third, ..."""
    fps = fps or 25.0
    return fps / math.ceil(fps / MAX_RATE)


def count_of(row: Mapping[str, Any]) -> int:
    """How many samples a probed source has."""
    return max(1, round(row["source_duration"] * rate_of(row["source_fps"])))


def samples(file: Any, row: Mapping[str, Any], first: int, last: int) -> Iterator[Sample]:
    """The samples `first` to `last` of a probed source, as far as it has them.

    Raises BadClip where a frame is damaged.
    """
    rate = rate_of(row["source_fps"])
    first, last = max(0, first), min(last, count_of(row) - 1)
    number, time, most = -1, 0.0, 0.0
    picture: np.ndarray | None = None
    for at, new in _pictures(file, row, (first - 1) / rate, (last + 1) / rate):
        step = math.floor(at * rate + _SLACK)
        if picture is None:
            number, time = step, at
        else:
            if step > number:
                yield from _repeated(number, time, picture, first, min(last, step - 1), rate)
                number, most = step, -1.0
            change = difference(picture, new)
            if change > most:
                time, most = at, change
        picture = new
    assert picture is not None, "there is no frame, which reading them has told"
    yield from _repeated(number, time, picture, first, last, rate)


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference of two pictures in levels of 255."""
    return float(np.abs(first.astype(np.int16) - second).mean())


def _repeated(
    number: int, time: float, picture: np.ndarray, first: int, last: int, rate: float
) -> Iterator[Sample]:
    """A sample, and the same picture again for the steps up to `last` at which no frame comes."""
    for step in range(number, last + 1):
        if step >= first:
            yield Sample(step, time if step == number else step / rate, picture)


def _pictures(
    file: Any, row: Mapping[str, Any], begin: float, end: float
) -> Iterator[tuple[float, np.ndarray]]:
    frames = frames_between(
        file,
        max(0.0, begin),
        end,
        row["source_traits"],
        row["source_start"],
        row["source_fps"],
        is_seekable=row["is_seekable"],
        from_shown=True,
    )
    for time, _, frame in frames:
        yield time, np.ascontiguousarray(small_picture(frame, HEIGHT, WIDTH))
