"""Differences of runs that met the same clips with the same noise, and how sure they are.

Data order, noise levels, noise and dropped captions are functions of the seed and the step, so two runs that differ in
a learning rate, say, share all of that: step for step the luck of the draw is the same in both, and goes out in their
difference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np

from sora_train.config.resumption import resume_class

SHARE = 0.5
"""The last part of the steps that two runs have in common which is compared: at the beginning all runs are alike."""
LEAST_BATCHES = 4
SAME_DATA = ("task", "seed", "data", "buckets", "train.micro_batches", "elastic")
SAME_LOSS = ("vae", "text.max_length", "objective", "loss", "vae_objective")


@dataclass(frozen=True)
class PairedDifference:
    """A mean difference with its confidence interval. NaN bounds: too little to tell."""

    mean: float
    low: float
    high: float
    unpaired: float
    """Width of the interval had the runs not been paired."""
    over: str
    """What the interval is over: `8 batches of 9 steps`, `3 seeds`."""

    @property
    def sure(self) -> bool:
        return self.low > 0 or self.high < 0


def of_steps(
    ours: Mapping[int, float], theirs: Mapping[int, float], confidence: float
) -> PairedDifference:
    """Mean of ours minus theirs over the last half of the steps both have, by batch means.

    The steps of a run are correlated, so the interval is made of the means of about n^(1/3) batches of neighbouring
    steps, which hardly are (Flegal and Jones, "Batch means and spectral variance estimators in Markov chain Monte
    Carlo", 2010, section 3). Steps without a finite loss in both are left out.
    """
    steps = sorted(
        step
        for step in ours.keys() & theirs.keys()
        if math.isfinite(ours[step]) and math.isfinite(theirs[step])
    )
    steps = steps[-max(1, math.ceil(SHARE * len(steps))) :] if steps else []
    a, b = (np.array([run[step] for step in steps]) for run in (ours, theirs))
    count = max(LEAST_BATCHES, round(len(steps) ** (1 / 3)))
    size = len(steps) // count
    mean = float((a - b).mean()) if steps else math.nan
    if size == 0:
        return PairedDifference(mean, math.nan, math.nan, math.nan, f"{len(steps)} step(s)")
    half = _half(_batches(a - b, count, size), confidence)
    apart = _half_apart(_batches(a, count, size), _batches(b, count, size), confidence)
    return PairedDifference(
        mean, mean - half, mean + half, 2 * apart, f"{count} batches of {size} step(s)"
    )


def of_pairs(
    ours: Sequence[float], theirs: Sequence[float], confidence: float, unit: str
) -> PairedDifference:
    """Mean of ours minus theirs pair by pair, with Student's interval; `unit` names what a pair has in common."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, over = fmean(differences), f"{len(differences)} {unit}"
    if len(differences) < 2:
        return PairedDifference(mean, math.nan, math.nan, math.nan, over)
    half = _half(np.array(differences), confidence)
    apart = _half_apart(np.array(ours), np.array(theirs), confidence)
    return PairedDifference(mean, mean - half, mean + half, 2 * apart, over)


def unlike(a: Mapping[str, object], b: Mapping[str, object]) -> str:
    """Why two runs cannot be compared step by step, by their dotted configurations; empty where they can."""
    for names, why in (
        (SAME_DATA, "they do not meet the same clips"),
        (SAME_LOSS, "their losses are not of the same kind"),
    ):
        for key in sorted(a.keys() | b.keys()):
            held = any(key == name or key.startswith(f"{name}.") for name in names)
            if held and a.get(key) != b.get(key) and resume_class(key) != "free":
                return f"{key} is {a.get(key)} and {b.get(key)}, so {why}"
    return ""


def student(confidence: float, freedom: int) -> float:
    """The two-sided quantile of Student's t (Abramowitz and Stegun, 26.7.5; exact for one and two degrees)."""
    p = (1 + confidence) / 2
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        alpha = 4 * p * (1 - p)
        return 2 * (p - 0.5) * math.sqrt(2 / alpha)
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def _batches(values: np.ndarray, count: int, size: int) -> np.ndarray:
    """The means of the last `count` batches of `size` values."""
    return values[-count * size :].reshape(count, size).mean(axis=1)


def _half_apart(a: np.ndarray, b: np.ndarray, confidence: float) -> float:
    """Half the width of Welch's interval for the difference of the means of two samples that have nothing in common."""
    squares = [stdev(map(float, x)) ** 2 / len(x) for x in (a, b)]
    total = sum(squares)
    # The square of so small a variance is 0, and a division by it would fail.
    if total**2 == 0:
        return 0.0
    freedom = total**2 / sum(
        square**2 / (len(x) - 1) for square, x in zip(squares, (a, b), strict=True)
    )
    return student(confidence, max(1, math.floor(freedom + 1e-9))) * math.sqrt(total)


def _half(values: np.ndarray, confidence: float) -> float:
    """Half the width of Student's interval for the mean of these."""
    count = len(values)
    return student(confidence, count - 1) * stdev(map(float, values)) / math.sqrt(count)
