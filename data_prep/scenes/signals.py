"""What is measured of each sample of a source and tells of transitions: a few numbers, so that hours fit in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.scenes import pyscenedetect, transnet
from data_prep.scenes.samples import Sample, difference

LAG = 2
"""Samples before and after a step that must differ as well: a flash of light comes back to what was there."""


@dataclass(frozen=True)
class Signals:
    """Columns of equal length, a row a sample, numbered from `first` without gaps."""

    first: int
    time: np.ndarray
    """Seconds after the source's first frame, as in `Sample`."""
    change: np.ndarray
    """Mean absolute difference to the sample before, levels of 255."""
    lasting: np.ndarray
    """The least difference between a sample before the step and one from it on, as far apart as `2 LAG + 1`."""
    contrast: np.ndarray
    """Standard deviation of the brightness in levels of 255; about 0 in a picture of one colour."""
    ends: np.ndarray
    """Probability that the sample is the last of its scene: TransNetV2's."""
    within: np.ndarray
    """Probability that the sample belongs to a transition: TransNetV2's."""
    stepped: np.ndarray
    """bool: PySceneDetect finds a cut before the sample."""


def signals(pictures: Iterable[Sample], detector: str, last: int) -> Signals:
    """The signals of samples up to `last`; those that the detector has no use for are 0.

    Raises UserError where a package of the detector is missing.
    """
    rows: list[tuple[float, ...]] = []
    held: deque[np.ndarray] = deque(maxlen=2 * LAG + 2)
    first, stepped = -1, set[int]()
    for sample, ends, within in _judged(pictures, detector, stepped):
        if sample.number > last:
            break
        first = sample.number if first < 0 else first
        before = held[-1] if held else sample.picture
        held.append(sample.picture)
        brightness = sample.picture.mean(axis=2)
        change = difference(before, sample.picture)
        rows.append((sample.time, change, _least(held), float(brightness.std()), ends, within))
    columns = np.array(rows, np.float64).reshape(-1, 6).T
    # What is held when a step is measured lies LAG samples ahead of it.
    lasting = np.concatenate([columns[2][LAG:], np.zeros(min(LAG, len(rows)))])
    numbers = np.arange(first, first + len(rows))
    is_step = np.isin(numbers, np.array(sorted(stepped), np.int64))
    return Signals(
        first, columns[0], columns[1], lasting, columns[3], columns[4], columns[5], is_step
    )


def _judged(
    pictures: Iterable[Sample], detector: str, stepped: set[int]
) -> Iterator[tuple[Sample, float, float]]:
    """Samples with TransNetV2's probabilities where they are wanted; adds PySceneDetect's cuts to `stepped`."""
    if detector in ("joined", "transnetv2"):
        yield from transnet.probabilities(pictures)
        return
    if detector == "pyscenedetect":
        pictures = pyscenedetect.marking(pictures, stepped)
    for sample in pictures:
        yield sample, 0.0, 0.0


def _least(held: deque[np.ndarray]) -> float:
    """The least difference between a picture before the middle of those held and one behind it."""
    if len(held) < 2 * LAG + 2:
        return 0.0
    return min(difference(held[LAG - lag], held[LAG + 1 + lag]) for lag in range(LAG + 1))
