"""Keyed random words for whole columns: word i is a function of the key and of number i alone.

SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"), vectorised.
"""

from __future__ import annotations

import numpy as np


def words(key: int, numbers: np.ndarray) -> np.ndarray:
    """64-bit words, one for each number."""
    return scramble(numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key))


def uniforms(words: np.ndarray, stream: int) -> np.ndarray:
    """Uniforms in [0, 1), one for each word; streams of the same words are independent of each other."""
    step = np.uint64((stream + 1) * 0xD1B54A32D192ED03 & (1 << 64) - 1)
    return (scramble(words + step) >> np.uint64(11)) * 2.0**-53


def scramble(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of a word decides on every bit of the result."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
