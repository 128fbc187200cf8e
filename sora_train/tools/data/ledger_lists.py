"""What the clip ledger concludes from losses: which clips were mislabelled, memorised or never learned. Pure numpy.

Every score says how far a clip is from what is usual, so that clips can be ranked; a list holds those beyond a bound.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sora_train.tools.data.ledger_losses import Losses

FEWEST = 8
"""Clips of one shape that are compared with each other; fewer are compared with those of all shapes."""
ROBUST = 1.4826
"""Makes the median absolute deviation the standard deviation of a normal law."""
MISLABELLED, MEMORISED, NEVER_LEARNED = 0.7, 2.0, 3.0
"""The bounds of the lists."""


@dataclass(frozen=True)
class Scores:
    """Scores (N,) of the clips by list, NaN where a list has nothing to go by."""

    mislabelled: np.ndarray
    memorised: np.ndarray
    never_learned: np.ndarray

    def listed(self) -> dict[str, np.ndarray]:
        """Places of the clips of each list, the highest score first."""
        bounds = {
            "mislabelled": MISLABELLED,
            "memorised": MEMORISED,
            "never learned": NEVER_LEARNED,
        }
        of_list = {}
        for name, bound in bounds.items():
            scores = getattr(self, name.replace(" ", "_"))
            places = np.flatnonzero(scores >= bound)
            of_list[name] = places[np.argsort(-scores[places], kind="stable")]
        return of_list


def scores_of(
    last: Losses,
    held: Losses,
    first: Losses | None,
    held_first: Losses | None,
    *,
    by_empty: bool = True,
) -> Scores:
    """Scores of the clips of `last`, the same clips as in `first`; `held` are held-out clips at the two checkpoints.
    `by_empty`: see `mislabelled`."""
    return Scores(
        mislabelled(last, by_empty=by_empty),
        memorised(last, held, first, held_first),
        never_learned(last, first),
    )


def mislabelled(losses: Losses, *, by_empty: bool = True) -> np.ndarray:
    """0 for a clip whose caption helps as much as is usual, 1 where it helps no more than none does.

    A caption's help at a noise level is how much the loss falls from the empty caption to the clip's own, under one
    noise; of a model that never met the empty caption, from other clips' captions (`by_empty` False). Others' captions
    tell less, since some of them happen to fit. In units of its spread over the clips the usual help says how well a
    level tells a right caption from a wrong one, and the levels are weighted by it: Fisher's linear discriminant with
    independent levels of equal spread.
    """
    help_NL = (losses.empty if by_empty else _mean(losses.exchanged)) - losses.own
    if not np.isfinite(help_NL).any(axis=0).all():
        return np.full(len(help_NL), np.nan)
    usual, spread = _by_shape(losses.shapes, help_NL, _usual)
    weight = np.maximum(usual / spread, 0.0)
    below = (usual - help_NL) / spread
    total = (weight**2).sum(axis=1)
    return np.where(total > 0, (weight * below).sum(axis=1) / np.maximum(total, 1e-12), np.nan)


def memorised(
    last: Losses, held: Losses, first: Losses | None, held_first: Losses | None
) -> np.ndarray:
    """How many standard deviations of held-out clips a clip's loss lies below theirs, the mean over the levels.

    A plain clip has a low loss without being known by heart. Where there is an earlier checkpoint, the fall since then
    is compared with that of held-out clips too, and the smaller of both counts.
    """
    if not len(held.rows):
        return np.full(len(last.rows), np.nan)
    below = -_beside(last.shapes, last.own, held.shapes, held.own)
    if first is None or held_first is None:
        return below
    falls = _beside(last.shapes, first.own - last.own, held.shapes, held_first.own - held.own)
    return np.minimum(below, falls)


def never_learned(last: Losses, first: Losses | None) -> np.ndarray:
    """How many robust standard deviations a clip's loss fell less than is usual, where it hardly fell (by less than a
    tenth of what is usual); else 0. The fall is that of the logarithm, the mean over the levels."""
    if first is None:
        return np.full(len(last.rows), np.nan)
    fall = np.log(first.own / last.own).mean(axis=1, keepdims=True)
    usual, spread = _by_shape(last.shapes, fall, _usual)
    score = np.where(fall < 0.1 * usual, (usual - fall) / spread, 0.0)
    return score[:, 0]


def _mean(exchanged: np.ndarray) -> np.ndarray:
    """The mean over captions (N, L) of those that were other captions; NaN where none was."""
    known = np.isfinite(exchanged)
    total = np.where(known, exchanged, 0.0).sum(axis=2)
    return np.where(known.any(axis=2), total / np.maximum(known.sum(axis=2), 1), np.nan)


def _usual(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Median and robust standard deviation of each level, which a few odd clips do not move."""
    usual = np.nanmedian(values, axis=0)
    spread = ROBUST * np.nanmedian(np.abs(values - usual), axis=0)
    return usual, np.maximum(spread, 1e-12)


def _by_shape(
    shapes: np.ndarray,
    values: np.ndarray,
    statistic: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """For each clip the two statistics (N, L) of its shape's clips, or of all where these are few."""
    of_all = statistic(values)
    first, second = (np.broadcast_to(one, values.shape).copy() for one in of_all)
    for shape in np.unique(shapes):
        own = shapes == shape
        if own.sum() >= FEWEST:
            first[own], second[own] = statistic(values[own])
    return first, second


def _beside(
    shapes: np.ndarray, values: np.ndarray, held_shapes: np.ndarray, held: np.ndarray
) -> np.ndarray:
    """How many standard deviations of held-out clips of its shape a clip's values (N, L) lie above their mean, the
    mean over the levels."""
    above = np.empty(len(values))
    for shape in np.unique(shapes):
        own, like = shapes == shape, held_shapes == shape
        peers = held[like] if like.sum() >= FEWEST else held
        spread = np.maximum(peers.std(axis=0), 1e-12)
        above[own] = ((values[own] - peers.mean(axis=0)) / spread).mean(axis=1)
    return above
