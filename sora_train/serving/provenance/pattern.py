"""The watermark's pattern: waves whose phases are the key's, as many to the frame's short side at every size.

A wave is a pair (ky, kx) of whole numbers, periods along the short side of the frame, so a frame that is scaled shows
the same waves, and one that is cropped to a share s of its short side shows them s times as long.
"""

import hashlib

import numpy as np

BANDS = ((6, 26), (4, 14))
"""Least and most periods along the short side. The first suits frames whose short side is at least SMALL pixels; of
smaller ones a codec keeps only the coarser waves of the second."""
SMALL = 128
REACH = max(high for _, high in BANDS)
PERIODS = np.arange(-REACH, REACH + 1)
_MAX_PERIODS_PER_PIXEL = 0.45


def phases(key: bytes) -> np.ndarray:
    """Numbers of modulus 1, [ky, kx] of PERIODS: uniform and independent but that opposite waves are conjugate.

    They are drawn by SHAKE-256 from the key, so who does not have it cannot tell them from chance.
    """
    count = len(PERIODS) ** 2
    half = count // 2
    drawn = hashlib.shake_256(b"sora_train watermark 1\0" + key).digest(8 * half)
    turns = np.frombuffer(drawn, "<u8").astype(np.float64) * (2 * np.pi / 2**64)
    waves = np.zeros(count, complex)
    waves[:half] = np.exp(1j * turns)
    waves[half + 1 :] = waves[:half].conj()[::-1]
    return waves.reshape(len(PERIODS), len(PERIODS))


def band(number: int, periods_per_pixel: float) -> np.ndarray:
    """Which waves of PERIODS are in a band and can be seen where the frame's pixels are that large."""
    low, high = BANDS[number]
    radius = np.hypot(PERIODS[:, None], PERIODS[None])
    visible = radius * periods_per_pixel <= _MAX_PERIODS_PER_PIXEL
    return (radius >= low) & (radius <= high) & visible


def waves(pixels: int, periods_per_pixel: float) -> np.ndarray:
    """The waves along one side of a frame, [pixel, k]."""
    places = (np.arange(pixels) + 0.5) * periods_per_pixel
    return np.exp(2j * np.pi * np.outer(places, PERIODS))


def drawn(coefficients: np.ndarray, height: int, width: int) -> np.ndarray:
    """The picture of waves with these coefficients, [y, x], with a root mean square of 1."""
    step = 1 / min(height, width)
    picture = (waves(height, step) @ coefficients @ waves(width, step).T).real
    return (picture / picture.std()).astype(np.float32)


def shifted(coefficients: np.ndarray, down: float, right: float) -> np.ndarray:
    """The coefficients of a picture that lies so many short sides further down and to the right."""
    turns = PERIODS[:, None] * down + PERIODS[None] * right
    return coefficients * np.exp(-2j * np.pi * turns)
