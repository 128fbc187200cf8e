"""An interval that may be looked at after every block of steps, and the comparison ended when it tells enough.

An ordinary interval of 95 % that is looked at again and again leaves out 0 sooner or later, even if nothing differs. A
confidence sequence holds its level over all looks together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from sora_train.evaluation.paired import student

LEAST_BLOCKS = 10
"""Fewer say too little about their own spread."""
SHARPEST = 20
"""Number of blocks at which the sequence is about as narrow as it can be."""


@dataclass(frozen=True)
class SequentialInterval:
    """The mean so far, and its bounds; NaN bounds: fewer than LEAST_BLOCKS blocks."""

    mean: float
    low: float
    high: float
    blocks: int

    @property
    def sure(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0


def block_means(
    ours: Mapping[int, float], theirs: Mapping[int, float], size: int, first: int
) -> list[float]:
    """Means of ours minus theirs over whole blocks of `size` steps from step `first` on, up to the first step that one
    of the two lacks, or where one is not finite."""
    differences: list[float] = []
    step = first
    while step in ours and step in theirs and math.isfinite(ours[step] - theirs[step]):
        differences.append(ours[step] - theirs[step])
        step += 1
    count = len(differences) // size
    return [math.fsum(differences[n * size : (n + 1) * size]) / size for n in range(count)]


def sequential_interval(values: Sequence[float], confidence: float) -> SequentialInterval:
    """The interval of a confidence sequence for the mean of values that come one by one.

    It is valid at whatever number of values one stops, whether their mean changes on the way or not: with probability
    `confidence` it never leaves out the mean of what the values are expected to be (Waudby-Smith, Arbour, Sinha,
    Kennedy and Ramdas, "Time-uniform central limit theory and asymptotic confidence sequences", arXiv:2103.06476,
    theorem 2.2; rho by their appendix B.2). As that holds for many values, two things are added for few: Student's
    quantile instead of the normal one, and the variance of an autoregression of the first order, its coefficient
    corrected for bias (Kendall, Biometrika 41, 1954), since neighbouring blocks are not quite independent.
    """
    y = np.asarray(values, dtype=np.float64)
    t = len(y)
    if t < LEAST_BLOCKS:
        return SequentialInterval(float(y.mean()) if t else math.nan, math.nan, math.nan, t)
    alpha = 1 - confidence
    mean, centred = float(y.mean()), y - y.mean()
    square = float((centred**2).sum())
    q = float((centred[1:] * centred[:-1]).sum()) / square if square else 0.0
    q = min(max(q + (1 + 4 * q) / t, 0.0), 0.95)
    deviation = math.sqrt(square / (t - 1) * (1 + q) / (1 - q))
    deviation *= student(confidence, t - 1) / NormalDist().inv_cdf(1 - alpha / 2)
    rho2 = (-2 * math.log(alpha) + math.log(1 - 2 * math.log(alpha))) / SHARPEST
    log = math.log(math.sqrt(t * rho2 + 1) / alpha)
    half = deviation * math.sqrt(2 * (t * rho2 + 1) / (t**2 * rho2) * log)
    return SequentialInterval(mean, mean - half, mean + half, t)
