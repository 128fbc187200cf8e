"""What is measured of each sample of a source and tells of transitions: 500 bytes, so that hours fit in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.scenes import pyscenedetect, transnet
from data_prep.scenes.samples import HEIGHT, WIDTH, Sample, difference

COARSE = 3
"""Pixels of a sample across one of its coarse picture, in which things that move a little stay where they are."""


@dataclass(frozen=True)
class Signals:
    """Columns of equal length N, a row a sample, numbered from `first` without gaps."""

    first: int
    time: np.ndarray
    """Seconds after the source's first frame, as in `Sample`."""
    change: np.ndarray
    """Mean absolute difference to the sample before, levels of 255."""
    contrast: np.ndarray
    """Standard deviation of the brightness in levels of 255; about 0 in a picture of one colour."""
    ends: np.ndarray
    """Probability that the sample is the last of its scene: TransNetV2's."""
    within: np.ndarray
    """Probability that the sample belongs to a transition: TransNetV2's."""
    stepped: np.ndarray
    """bool: PySceneDetect finds a cut before the sample."""
    coarse: np.ndarray
    """uint8 (N, 432): the picture at a third of its size."""


def signals(pictures: Iterable[Sample], detector: str, last: int) -> Signals:
    """The signals of samples up to `last`; those that the detector has no use for are 0.

    Raises UserError where a package of the detector is missing.
    """
    rows, coarse = list[tuple[float, ...]](), list[np.ndarray]()
    first, stepped = -1, set[int]()
    before: np.ndarray | None = None
    for sample, ends, within in _judged(pictures, detector, stepped):
        if sample.number > last:
            break
        first = sample.number if first < 0 else first
        change = 0.0 if before is None else difference(before, sample.picture)
        before = sample.picture
        contrast = float(before.mean(axis=2).std())
        rows.append((sample.time, change, contrast, ends, within))
        coarse.append(_coarse(before))
    time, changes, contrasts, all_ends, all_within = np.array(rows, np.float64).T
    return Signals(
        first=first,
        time=time,
        change=changes,
        contrast=contrasts,
        ends=all_ends,
        within=all_within,
        stepped=np.isin(np.arange(first, first + len(rows)), np.array(sorted(stepped), np.int64)),
        coarse=np.stack(coarse),
    )


def _coarse(picture: np.ndarray) -> np.ndarray:
    shape = (HEIGHT // COARSE, COARSE, WIDTH // COARSE, COARSE, 3)
    return (picture.reshape(shape).mean(axis=(1, 3)) + 0.5).astype(np.uint8).reshape(-1)


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
