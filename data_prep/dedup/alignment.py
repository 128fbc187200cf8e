"""How far two clips differ once one is laid onto the other: cropped, stretched, shifted in time, mirrored.

The crop is found by Gauss-Newton steps over the mean picture and the slowest changes (Lucas and Kanade 1981, with a
scale and a shift for either axis), the shift in time by trying.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from data_prep.dedup.volume import SIDE, TIMES

# Gray levels squared: what codecs change in a value of a volume.
NOISE = 1.0
BLUR = 0.2
CHANNELS = 4
_STEPS = 8
_MOST_SCALE, _MOST_SHIFT = 0.3, 0.3
# Crops a side of one clip or the other from which the search begins.
_STARTS = ((1.0, 1.0), (0.84, 0.84), (1.19, 1.19))
_MOST_TIME_SHIFT, _TIME_STEPS = 1.0, 5
_BATCH = 512


def distances(left: np.ndarray, right: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """float64 (pairs,): 0 for what shows the same, about 1 for what has nothing in common, for each pair of volumes.

    left, right: uint8 (pairs, TIMES, SIDE, SIDE); mirrored: bool (pairs,), of those whose `right` is turned around.
    """
    found = [np.zeros(0)]
    for begin in range(0, len(left), _BATCH):
        part = slice(begin, begin + _BATCH)
        a, b = left[part].astype(np.float32), right[part].astype(np.float32)
        b = np.where(mirrored[part, None, None, None], b[..., ::-1], b)
        found.append(_distances(a, b))
    return np.concatenate(found)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    place = _placed(a, b)
    # What is finer than two cells depends on where the cells lie.
    moved, mask = _warped(_blurred(a), place)
    return _apart(moved, _blurred(b), mask)


def _blurred(volume: np.ndarray) -> np.ndarray:
    """Each value mixed with its neighbours across and down."""
    blur = (1 - 2 * BLUR) * np.eye(SIDE, dtype=np.float32)
    blur += BLUR * (np.eye(SIDE, k=1, dtype=np.float32) + np.eye(SIDE, k=-1, dtype=np.float32))
    blur[[0, -1], [0, -1]] += BLUR
    return blur @ volume @ blur.T


def _channels(volume: np.ndarray) -> np.ndarray:
    """float32 (pairs, CHANNELS, SIDE, SIDE): the mean picture and the slowest changes."""
    return np.einsum("ct,ptyx->pcyx", cosines(CHANNELS, TIMES), volume)


@cache
def cosines(count: int, length: int) -> np.ndarray:
    """float32 (count, length): the lowest rows of the orthonormal DCT-II."""
    at = (np.arange(length) + 0.5) / length
    rows = np.cos(np.pi * np.arange(count)[:, None] * at) * np.sqrt(2 / length)
    rows[0] /= np.sqrt(2)
    return rows.astype(np.float32)


def _placed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 (pairs, 4): scale and shift across, scale and shift down, that lay `a` onto `b` best."""
    a, b = _channels(a), _channels(b)
    best = np.zeros((len(a), 4), np.float32)
    lowest = np.full(len(a), np.inf, np.float32)
    for across, down in _STARTS:
        place = np.tile(np.array([across, 0, down, 0], np.float32), (len(a), 1))
        for step in range(_STEPS + 1):
            moved, mask = _warped(a, place)
            difference, weight = _difference(moved, b, mask)
            cost = (difference**2).sum((1, 2, 3)) / weight
            better = cost < lowest
            best[better], lowest[better] = place[better], cost[better]
            if step < _STEPS:
                place = _stepped(place, moved, difference, mask)
    return best


def _difference(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`b - a` where the mask is, the mean brightness of either taken off; and the weights to divide its squares by."""
    count = mask.sum((1, 2))
    difference = (b - a) * mask[:, None]
    difference[:, 0] -= (difference[:, 0].sum((1, 2)) / count)[:, None, None] * mask
    energy = (((b - _mean(b, mask)) * mask[:, None]) ** 2).sum((1, 2, 3))
    energy += (((a - _mean(a, mask)) * mask[:, None]) ** 2).sum((1, 2, 3))
    return difference, energy + NOISE * count


def _mean(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean picture's mean under the mask, 0 for the changes: (pairs, channels, 1, 1)."""
    mean = np.zeros((*values.shape[:2], 1, 1), np.float32)
    mean[:, 0, 0, 0] = (values[:, 0] * mask).sum((1, 2)) / mask.sum((1, 2))
    return mean


def _stepped(
    place: np.ndarray, moved: np.ndarray, difference: np.ndarray, mask: np.ndarray
) -> np.ndarray:
    """A step of Gauss and Newton from `place`, inside the bounds."""
    at = _grid()
    down, across = np.gradient(moved, axis=(2, 3))
    per_cell = 2 / SIDE
    # The warped picture's slope is that of the source times the scale.
    across = across / per_cell * mask[:, None] / place[:, 0, None, None, None]
    down = down / per_cell * mask[:, None] / place[:, 2, None, None, None]
    slopes = np.stack([across * at, across, down * at[:, None], down], 1).reshape(len(place), 4, -1)
    squares = slopes @ slopes.transpose(0, 2, 1)
    squares += (
        np.eye(4, dtype=np.float32)
        * (1e-3 * np.trace(squares, axis1=1, axis2=2) + 1e-3)[:, None, None]
    )
    step = np.linalg.solve(squares, slopes @ difference.reshape(len(place), -1, 1))[..., 0]
    place = place + np.clip(step, -0.1, 0.1)
    low = np.array([1 - _MOST_SCALE, -_MOST_SHIFT] * 2, np.float32)
    return np.clip(place, low, np.array([1 + _MOST_SCALE, _MOST_SHIFT] * 2, np.float32))


@cache
def _grid() -> np.ndarray:
    """float32 (SIDE,): the middles of the cells, in [-1, 1]."""
    return ((np.arange(SIDE) + 0.5) * 2 / SIDE - 1).astype(np.float32)


def _warped(values: np.ndarray, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`values` (pairs, n, SIDE, SIDE) seen at `place`, and float32 (pairs, SIDE, SIDE), 1 where they reach."""
    across, inside_x = _taps(place[:, 0], place[:, 1])
    down, inside_y = _taps(place[:, 2], place[:, 3])
    moved = down[:, None] @ values @ across.transpose(0, 2, 1)[:, None]
    return moved, inside_y[:, :, None] * inside_x[:, None, :]


def _taps(scale: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 (pairs, SIDE, SIDE), the weights of linear interpolation along an axis; (pairs, SIDE), its reach."""
    at = (_grid() * scale[:, None] + shift[:, None] + 1) * (SIDE / 2) - 0.5
    weights = np.clip(1 - np.abs(np.clip(at, 0, SIDE - 1)[..., None] - np.arange(SIDE)), 0, None)
    return weights.astype(np.float32), ((at > -0.75) & (at < SIDE - 0.25)).astype(np.float32)


@cache
def _time_shifts() -> list[tuple[np.ndarray, slice]]:
    """Ways to move the beginning and the end of a clip in time: float64 (times, TIMES), the weights for the times at
    which it then shows anything, and these times."""
    offsets = np.linspace(-_MOST_TIME_SHIFT, _MOST_TIME_SHIFT, _TIME_STEPS)
    at = (np.arange(TIMES) + 0.5) / TIMES
    found = []
    for begin in offsets:
        for end in offsets:
            where = (at * TIMES - 0.5) + begin * (1 - at) + end * at
            shown = np.flatnonzero((where > -0.3) & (where < TIMES - 0.7))
            where = np.clip(where[shown], 0, TIMES - 1)
            weights = np.clip(1 - np.abs(where[:, None] - np.arange(TIMES)), 0, None)
            found.append((weights, slice(shown[0], shown[-1] + 1)))
    return found


def _apart(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """float64 (pairs,): the larger of how far the mean pictures differ and how far the changes around them do.

    Of the pictures only what is no even slope counts: skies and walls have that in common.
    """
    count = mask.sum((1, 2))
    a, b = ((v * mask[:, None]).reshape(len(v), TIMES, -1).astype(np.float64) for v in (a, b))
    aa, ab, bb = a @ a.transpose(0, 2, 1), a @ b.transpose(0, 2, 1), b @ b.transpose(0, 2, 1)
    slopes = _slopes(mask)
    on_a, on_b = a @ slopes, b @ slopes
    still = aa - on_a @ on_a.transpose(0, 2, 1), bb - on_b @ on_b.transpose(0, 2, 1)
    still_ab = ab - on_a @ on_b.transpose(0, 2, 1)
    lowest = np.full(len(a), np.inf)
    for shift, at in _time_shifts():
        values = count * len(shift)
        means = (shift @ still[0] @ shift.T, shift @ still_ab[:, :, at], still[1][:, at, at])
        of_means = _ratio(*(v.mean((1, 2)) * len(shift) for v in means), values)
        changes = (shift @ aa @ shift.T, shift @ ab[:, :, at], bb[:, at, at])
        of_changes = _ratio(*map(_about_mean, changes), values)
        lowest = np.minimum(lowest, np.maximum(of_means, of_changes))
    return lowest


def _about_mean(products: np.ndarray) -> np.ndarray:
    """(pairs,): the sum of products of what two clips are beside their means over time, of all times' products."""
    return np.trace(products, axis1=1, axis2=2) - products.mean((1, 2)) * products.shape[1]


def _slopes(mask: np.ndarray) -> np.ndarray:
    """float64 (pairs, SIDE * SIDE, 3): orthonormal pictures, of even brightness and of slopes, under each mask."""
    y, x = np.meshgrid(_grid(), _grid(), indexing="ij")
    pictures = np.stack([np.ones_like(x), x, y], 2).reshape(-1, 3)
    return np.linalg.qr(pictures * mask.reshape(len(mask), -1, 1).astype(np.float64))[0]


def _ratio(*products_and_count: np.ndarray) -> np.ndarray:
    """|a - b|^2 / (|a|^2 + |b|^2) of (aa, ab, bb, values): either with the noise of that many values."""
    aa, ab, bb, values = products_and_count
    return np.clip(aa + bb - 2 * ab, 0, None) / (aa + bb + 2 * NOISE * values)
