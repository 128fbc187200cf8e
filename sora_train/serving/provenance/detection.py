"""Looks for the watermark of a key in a picture: at every shift, at every crop, with a known chance of a false alarm.

The score of one place is Z = sum over waves of |c| cos(phase of c - phase of the key), divided by its standard
deviation, where c are the weighted Fourier coefficients of the picture. For a picture that knows nothing of the key
those phase differences are independent and uniform, whatever the picture: a cosine of a uniform angle is sub-Gaussian
with its own variance (its moment generating function is the Bessel function I0(t) <= exp(t^2 / 4)), so
P(Z >= z) <= exp(-z^2 / 2), and over all places that are tried P(best >= z) <= PLACES * exp(-z^2 / 2). The threshold
makes that FALSE_ALARM. No statistics of pictures enter.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sora_train.serving.provenance.pattern import BANDS, PERIODS, REACH, band, waves

FALSE_ALARM = 1e-6
CROPS = np.exp(-0.006 * np.arange(86))
"""Shares of the short side that a crop may have left; between two of them a wave at the edge loses its phase by less
than a sixth of a turn."""
GRID = 128
"""Shifts that are tried along either axis, over one short side."""
PLACES = len(CROPS) * GRID**2 * len(BANDS)
THRESHOLD = math.sqrt(2 * math.log(PLACES / FALSE_ALARM))
_EDGE = 1e-9
_NORMALISED = 0.5


@dataclass(frozen=True)
class Detection:
    """The best score of a key in a video."""

    score: float
    crop: float
    """The share of the short side at which it was found."""
    threshold: float = THRESHOLD

    @property
    def present(self) -> bool:
        return self.score >= self.threshold

    @property
    def chance(self) -> float:
        """At most how probable such a score is in a video that was not marked with the key."""
        return min(1.0, PLACES * math.exp(-(self.score**2) / 2))


def spectra(picture: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
    """For each crop and band the weighted coefficients of a picture, divided by the standard deviation of a score."""
    short = min(picture.shape)
    for crop in CROPS:
        yield from ((float(crop), each) for each in spectrum(picture, crop / short))


def spectrum(picture: np.ndarray, periods_per_pixel: float) -> Iterator[np.ndarray]:
    """The weighted coefficients of each band of a picture whose pixels are that large."""
    down, right = (waves(pixels, periods_per_pixel).conj() for pixels in picture.shape)
    found = down.T @ picture @ right
    size = np.abs(found)
    rings = np.rint(np.hypot(PERIODS[:, None], PERIODS[None])).astype(int)
    for number in range(len(BANDS)):
        inside = band(number, periods_per_pixel)
        power = np.bincount(rings[inside], (size**2)[inside], rings.max() + 1)
        count = np.bincount(rings[inside], minlength=rings.max() + 1)
        usual = np.sqrt(power / np.maximum(count, 1))[rings]
        weights = inside / np.maximum(size**_NORMALISED * usual ** (1 - _NORMALISED), _EDGE)
        weighted = found * weights
        yield weighted / max(float(np.linalg.norm(weighted)), _EDGE)


def scores(spectrum: np.ndarray, key_phases: np.ndarray) -> np.ndarray:
    """Z at every shift [down, right], in steps of a GRID-th of the short side."""
    products = np.zeros((GRID, GRID // 2 + 1), np.complex64)
    products[np.ix_(PERIODS % GRID, PERIODS[REACH:])] = (spectrum * key_phases.conj())[:, REACH:]
    return np.fft.irfft2(products, (GRID, GRID)) * GRID**2


def detect(picture: np.ndarray, key_phases: np.ndarray) -> Detection:
    """The best place of a key's waves in a flattened picture."""
    assert REACH * 2 < GRID, "every wave has its place in the grid"
    found = ((scores(each, key_phases).max(), crop) for crop, each in spectra(picture))
    score, crop = max(found)
    return Detection(float(score), crop)
