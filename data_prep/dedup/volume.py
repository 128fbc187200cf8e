"""What a clip shows, as a volume of a few gray values: what copies of it have in common, however they were encoded.

Time is cut into equal shares of the clip, so that speed does not count; each share is the mean of its frames, so that
an edge moved by some frames counts little. Black bars are cut off. Scale, aspect and colours do not count.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sora_train.data.decode.frames import BadClip

TIMES, SIDE = 16, 16
"""A volume is uint8 (TIMES, SIDE, SIDE)."""
LOOKED_AT = 96
"""Height and width of the pictures that it is made of."""
FORMAT = 1
"""Of volumes: those of another are not comparable."""
# Gray levels. Bars of a film are black, but for what a codec makes of them.
_DARK = 24
_MOST_BAR = 0.4
# Of a sixteenth of a clip.
_SHORTEST = 1e-3
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def volume_of(pictures: Iterable[tuple[float, float, np.ndarray]]) -> np.ndarray:
    """The volume of pictures in order, uint8 (LOOKED_AT, LOOKED_AT, 3) RGB, each shown from one share of the clip's
    length to another."""
    sums = np.zeros((TIMES, LOOKED_AT, LOOKED_AT), np.float64)
    shown = np.zeros(TIMES)
    brightest = np.zeros((LOOKED_AT, LOOKED_AT), np.float32)
    for begin, end, rgb in pictures:
        gray = rgb.astype(np.float32) @ _LUMA
        low, high = begin * TIMES, min(float(TIMES), end * TIMES)
        for number in range(max(0, int(low)), min(TIMES, int(high) + 1)):
            weight = max(0.0, min(high, number + 1) - max(low, number))
            sums[number] += weight * gray
            shown[number] += weight
        np.maximum(brightest, gray, out=brightest)
    filled = np.flatnonzero(shown > _SHORTEST)
    if not len(filled):
        raise BadClip("too_few_frames", "no frame of it is shown for any time")
    # Where no frame is shown, as behind the last, the nearest stands.
    nearest = filled[np.abs(np.arange(TIMES)[:, None] - filled).argmin(1)]
    means = sums[nearest] / shown[nearest, None, None]
    top, bottom = _bars(brightest.max(1))
    left, right = _bars(brightest.max(0))
    rows, columns = shares(LOOKED_AT, top, bottom, SIDE), shares(LOOKED_AT, left, right, SIDE)
    return np.clip(np.rint(rows @ means @ columns.T), 0, 255).astype(np.uint8)


def shares(length: int, begin: float, end: float, parts: int) -> np.ndarray:
    """float64 (parts, length): the means over equal parts of [begin, end) of samples that cover [0, length)."""
    edges = np.linspace(begin, end, parts + 1)
    low, high = edges[:-1, None], edges[1:, None]
    at = np.arange(length)
    covered = np.clip(np.minimum(high, at + 1) - np.maximum(low, at), 0, None)
    return covered / covered.sum(1, keepdims=True)


def _bars(brightest: np.ndarray) -> tuple[int, int]:
    """[begin, end) of what is no bar, by the brightest value that each line ever has."""
    lit = np.flatnonzero(brightest >= _DARK)
    length = len(brightest)
    most = int(_MOST_BAR * length)
    if not len(lit) or lit[0] > most or length - 1 - lit[-1] > most:
        return 0, length
    # The line beside a bar holds some of it.
    return int(lit[0]) + (lit[0] > 0), int(lit[-1]) + (lit[-1] == length - 1)


def detail_of(volume: np.ndarray) -> float:
    """Gray levels by which the pictures of a volume deviate from smooth slopes, as a root of the mean square.

    What has next to none, such as black, a sky or a plain title's ground, looks like any other of its kind.
    """
    at = (np.arange(SIDE) + 0.5) * 2 / SIDE - 1
    y, x = np.meshgrid(at, at, indexing="ij")
    smooth = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], 2).reshape(-1, 6)
    basis = np.linalg.qr(smooth)[0]
    pictures = volume.reshape(TIMES, -1).astype(np.float64)
    rest = pictures - pictures @ basis @ basis.T
    return float(np.sqrt((rest**2).mean()))
