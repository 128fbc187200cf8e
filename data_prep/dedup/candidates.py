"""Which clips may be copies of each other, found without comparing all with all.

A volume's slow and coarse part, as numbers of about equal weight, is hashed to the signs of random projections
(Charikar 2002), a band of bits each. Clips that share a band are candidates; every clip is hashed as it is, with its
borders cropped, and mirrored. In a crowded band a clip meets only those that sort next to it, so that the work grows
with the number of clips, not with its square. Candidates whose coarse parts differ are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from data_prep.dedup.alignment import cosines
from data_prep.dedup.volume import SIDE, TIMES, shares

BANDS, BITS = 24, 16
NEIGHBOURS = 8
"""How many of those that share a band a clip meets, in the order of a finer hash."""
MOST_APART = 0.55
"""Of coarse parts, as `alignment.distances` counts it; copies whose border was cut off come to 0.3."""
MOST_BITS = 90
"""Of the BANDS * BITS that two may differ in, a cosine of about 0.7."""
# Gray levels squared: what codecs change in slow parts of a clip that stands still.
_NOISE = 4.0
_TIMES, _SIDES = 4, 6
_CROPS = (0.0, 0.05, 0.10)
_BATCH = 2048
_SEED = 20_011
Near = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""bool (n,): which of these pairs of entries are worth a closer look."""


def pairs_of_volumes(volumes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 (pairs, 2) of rows of uint8 (n, TIMES, SIDE, SIDE), the first the smaller, and bool (pairs,): mirrored."""
    kinds = len(_CROPS) + 1
    parts = [_coarse(volumes[n : n + _BATCH]) for n in range(0, len(volumes), _BATCH)]
    size = _TIMES * _SIDES * _SIDES
    entries = np.concatenate([np.zeros((kinds, 0, size), np.float32), *parts], 1).reshape(-1, size)
    owner = np.tile(np.arange(len(volumes)), kinds)
    turned = np.repeat(np.arange(kinds) == len(_CROPS), len(volumes))
    still = _SIDES * _SIDES
    noise = _NOISE * _weights().reshape(-1) ** 2

    def near(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        difference, sizes = (entries[left] - entries[right]) ** 2, squares[left] + squares[right]
        parts = np.stack([difference[:, :still].sum(1), difference[:, still:].sum(1)], 1)
        return (parts <= MOST_APART * sizes).all(1)

    both = [(entries[:, :still] ** 2).sum(1), (entries[:, still:] ** 2).sum(1)]
    squares = np.stack(both, 1) + [noise[:still].sum(), noise[still:].sum()]
    return _pairs(_bands(entries), owner, turned, near)


def pairs_of_vectors(vectors: np.ndarray, cosine: float) -> np.ndarray:
    """int64 (pairs, 2) of rows of float32 (n, d) of length 1 that have at least this cosine."""
    owner = np.arange(len(vectors))

    def near(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        return np.einsum("nd,nd->n", vectors[left], vectors[right]) >= cosine

    return _pairs(_bands(vectors), owner, np.zeros(len(vectors), bool), near)[0]


def _coarse(volumes: np.ndarray) -> np.ndarray:
    """float32 (crops + 1, n, _TIMES * _SIDES * _SIDES): of each crop, then of the mirrored volume."""
    slow = np.einsum("ct,ntyx->ncyx", cosines(_TIMES, TIMES), volumes.astype(np.float32))
    found = []
    for crop in _CROPS:
        rows = cosines(_SIDES, SIDE) @ shares(SIDE, crop * SIDE, SIDE - crop * SIDE, SIDE)
        rows = rows.astype(np.float32)
        found.append(rows @ slow @ rows.T * _weights())
    found.append(found[0] * (1 - 2 * (np.arange(_SIDES) % 2)).astype(np.float32))
    return np.stack(found).reshape(len(found), len(volumes), -1)


@cache
def _weights() -> np.ndarray:
    """float32 (times, sides, sides): pictures have less the finer it is; 0 for the mean brightness."""
    t, y, x = np.meshgrid(*map(np.arange, (_TIMES, _SIDES, _SIDES)), indexing="ij")
    weights = np.sqrt(np.hypot(y, x) + t + 0.5)
    weights[0, 0, 0] = 0
    return weights.astype(np.float32)


def _pairs(
    bands: np.ndarray, owner: np.ndarray, turned: np.ndarray, near: Near
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of owners whose entries share a band and are near, and whether one of the two is turned around."""
    words = np.ascontiguousarray(bands.T).view(np.uint64)
    found = [np.zeros(0, np.int64)]
    count = int(owner.max()) + 1 if len(owner) else 1
    for band in range(BANDS):
        order = np.lexsort((owner, bands[(band + 1) % BANDS], bands[band]))
        code, sorted_words = bands[band][order], words[order]
        for away in range(1, NEIGHBOURS + 1):
            same = np.flatnonzero(code[away:] == code[:-away])
            if not len(same):
                break
            # Half the bits tell most strangers apart.
            for part, most in ((np.s_[::2], MOST_BITS * 0.65), (np.s_[:], MOST_BITS)):
                differ = sorted_words[same, part] ^ sorted_words[same + away, part]
                same = same[np.bitwise_count(differ).sum(1) <= most]
            left, right = order[same], order[same + away]
            apart = owner[left] != owner[right]
            left, right = left[apart], right[apart]
            close = near(left, right)
            left, right = left[close], right[close]
            first, last = np.sort([owner[left], owner[right]], 0)
            found.append(((first * count + last) << 1) | (turned[left] != turned[right]))
    codes = np.unique(np.concatenate(found))
    return np.stack([(codes >> 1) // count, (codes >> 1) % count], 1), (codes & 1).astype(bool)


def _bands(entries: np.ndarray) -> np.ndarray:
    """uint16 (BANDS, entries): the signs of BITS random projections each."""
    draws = np.random.Generator(np.random.Philox(_SEED))
    planes = draws.standard_normal((entries.shape[1], BANDS * BITS), np.float32)
    found = np.empty((BANDS, len(entries)), np.uint16)
    for begin in range(0, len(entries), _BATCH):
        signs = entries[begin : begin + _BATCH] @ planes > 0
        packed = np.packbits(signs.reshape(-1, BANDS, BITS), 2)
        found[:, begin : begin + _BATCH] = packed.view(np.uint16)[..., 0].T
    return found
