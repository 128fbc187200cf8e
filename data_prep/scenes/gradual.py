"""Dissolves and fades: what TransNetV2 holds for one, frames that are a mixture of two scenes, and pictures gone plain.

Each is found by what lies within the longest transition around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

HALVES = (0.2, 0.35, 0.5, 0.7, 0.95)
"""Seconds before and after a sample, between whose pictures it may be a mixture."""
BLOCK = 4096
"""Samples that are compared at a time."""
NEAR = 2
"""Samples before and after one between which it is seen how fast the picture changes."""
LEAST_SPEED = 0.6
"""Of that of an even change: where transitions lie at both ends of a scene, the scene between changes less."""
LEAST_APART = 8.0
"""Mean difference of two scenes in levels of 255."""
SHORTEST = 3


@dataclass(frozen=True)
class Span:
    """Rows [begin, end) of the signals that belong to no scene."""

    begin: int
    end: int
    score: float


def runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """[begin, end) of the stretches of a bool (N,) that are true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def probable(within: np.ndarray, least: float, edge: float, longest: int) -> Iterator[Span]:
    """Runs of a probability that reaches `least`, as far as it is `edge` of its greatest; of cuts they are shorter."""
    for begin, end in runs(within >= least * edge):
        peak = float(within[begin:end].max())
        sure = begin + np.flatnonzero(within[begin:end] >= edge * peak)
        first, last = int(sure[0]), int(sure[-1]) + 1
        if peak >= least and SHORTEST <= last - first <= longest:
            yield Span(first, last, peak)


def mixed(
    coarse: np.ndarray, rate: float, most_variance: float, most_error: float, is_break: np.ndarray
) -> Iterator[Span]:
    """Runs about samples that lie halfway between two pictures and have less variance than both.

    Between them there is no cut and no plain picture, bool (N,) `is_break`, and it changes as fast as they are apart.
    Of spans that overlap, those are left out that are worse than one of them.

    The mean of two pictures that have nothing in common has half their variance (Lienhart 2001, "Reliable dissolve
    detection"); one from the way of a camera has as much as they, and a cut's is no mean at all.
    """
    count = len(coarse)
    breaks = np.cumsum(is_break)
    around = _halfway(coarse, NEAR)[2] / NEAR
    best, best_half = np.full(count, np.inf), np.zeros(count, np.int64)
    for half in sorted({max(2, round(seconds * rate)) for seconds in HALVES}):
        if count <= 2 * half:
            break  # no sample has so many before and behind it
        variance, error, apart = _halfway(coarse, half)
        passes = (variance <= most_variance) & (error <= most_error) & (apart >= LEAST_APART)
        passes &= around >= LEAST_SPEED * apart / half
        passes[half : count - half] &= breaks[2 * half :] == breaks[: count - 2 * half]
        better = passes & (variance < best)
        best[better], best_half[better] = variance[better], half
    spans: list[Span] = []
    for begin, end in runs(np.isfinite(best)):
        middle = begin + int(np.argmin(best[begin:end]))
        first, last = _mixture_ends(coarse, middle, int(best_half[middle]))
        if last - first >= SHORTEST:
            spans.append(Span(first, last, float(1 - best[middle] / 2)))
    for one in spans:
        if not any(o.begin < one.end and one.begin < o.end and o.score > one.score for o in spans):
            yield one


def _halfway(coarse: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each sample and those `half` before and behind it, float (N,) thrice.

    Its variance against the mean of theirs; its distance from their mean against theirs from each other; that distance
    in levels of 255.
    """
    count = len(coarse)
    variance, error, apart = np.full(count, np.inf), np.full(count, np.inf), np.zeros(count)
    own = np.concatenate([_variance(coarse[at : at + BLOCK]) for at in range(0, count, BLOCK)])
    for at in range(half, count - half, BLOCK):
        middles = np.arange(at, min(at + BLOCK, count - half))
        before = coarse[middles - half].astype(np.float32)
        behind = coarse[middles + half].astype(np.float32)
        apart[middles] = np.abs(behind - before).mean(axis=1)
        away = np.abs(coarse[middles] - (before + behind) / 2).mean(axis=1)
        error[middles] = away / np.maximum(apart[middles], 1e-3)
        around = (own[middles - half] + own[middles + half]) / 2
        variance[middles] = own[middles] / np.maximum(around, 1.0)
    return variance, error, apart


def _variance(coarse: np.ndarray) -> np.ndarray:
    """Of each colour over the picture, and their mean: float (N,)."""
    return coarse.reshape(len(coarse), -1, 3).astype(np.float32).var(axis=1).mean(axis=1)


def _mixture_ends(coarse: np.ndarray, middle: int, half: int) -> tuple[int, int]:
    """[begin, end) of the samples about `middle` that have parts of both pictures, each at least a twelfth."""
    before, behind = (coarse[middle + side].astype(np.float32) for side in (-half, half))
    way = behind - before
    window = coarse[middle - half : middle + half + 1].astype(np.float32)
    share = (window - before) @ way / max(float(way @ way), 1e-3)
    early = np.flatnonzero(share[:half] <= 1 / 12)
    late = np.flatnonzero(share[half:] >= 11 / 12)
    begin = int(early[-1]) + 1 if len(early) else 0
    end = half + int(late[0]) if len(late) else len(window)
    return middle - half + begin, middle - half + end


def faded(contrast: np.ndarray, plain: float, longest: int) -> Iterator[Span]:
    """Runs in which a picture loses its contrast step by step until it is plain, or gains it so, or both.

    Between two cuts to and from a plain picture there is none.
    """
    for begin, end in runs(contrast < plain):
        down = _slope(contrast[max(0, begin - longest) : begin + 1][::-1])
        up = _slope(contrast[end - 1 : end + longest])
        if end - begin > longest:
            # A scene of its own, that fades in and out.
            yield from [Span(begin - down, begin + 1, 1.0)] * (down >= SHORTEST)
            yield from [Span(end - 1, end + up, 1.0)] * (up >= SHORTEST)
        elif max(down, up) >= SHORTEST:
            first = begin - down if down >= SHORTEST else begin
            yield Span(first, end + (up if up >= SHORTEST else 0), 1.0)


def _slope(contrast: np.ndarray) -> int:
    """How many steps from its first value on the contrast grows evenly."""
    steps = np.diff(contrast)
    most = np.maximum.accumulate(steps) if len(steps) else steps
    flat = np.flatnonzero((steps < 0.2 * most) | (steps < 0.1))
    return int(flat[0]) if len(flat) else len(steps)
