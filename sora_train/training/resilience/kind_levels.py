"""What loss and gradient norm a step should have by what it holds: its kinds of clips, each with a level of its own.

A kind is a bucket and a band of noise levels. Some kinds have many times the loss of others, and a step that holds more
of them than most is no spike. The level of a kind is the median of its last losses, that of its norms the median
weighted by its share of their steps, since a norm cannot be taken apart.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from sora_train.training.outputs.step_metrics import KindOfClips

GAUSSIAN = 1.4826
"""A normal distribution's standard deviation in units of its MAD (Rousseeuw & Croux 1993,
doi:10.1080/01621459.1993.10476408)."""
KEPT = 32
"""Steps from which a kind's level is computed; a checkpoint holds three numbers of each."""
SEEN = 2
"""Steps after which a kind has a level ..."""
SPREAD_SEEN = 5
"""... and after which it has a deviation."""


@dataclass(frozen=True)
class Level:
    """A step's expected loss and norm, and the deviations of their logarithms that its kinds account for."""

    loss: float = 1.0
    grad_norm: float = 1.0
    loss_deviation: float = 0.0
    grad_norm_deviation: float = 0.0
    unknown: frozenset[str] = frozenset()
    """Kinds of the step that have no level yet: their part of the loss is left out."""


@dataclass(frozen=True)
class _Seen:
    """A kind in a step that was taken: logarithms of its mean loss and of the step's norm, and its share."""

    loss: float
    grad_norm: float
    share: float


class KindLevels:
    """The last steps of every kind."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[_Seen]] = {}

    def expected(self, shares: Mapping[str, float]) -> Level | None:
        """The level of a step that holds these shares of kinds; None where most of it has not been seen before.

        Without any kind it is 1, so that the step's own numbers are compared.
        """
        if not shares:
            return Level()
        known = {name: part for name, part in shares.items() if len(self._of(name)) >= SEEN}
        share = sum(known.values())
        if share < 0.5:
            return None
        loss = logarithm = loss_variance = norm_variance = 0.0
        for name, part in known.items():
            seen = self._of(name)
            level = math.exp(median(one.loss for one in seen))
            loss += part * level
            weights = [one.share for one in seen]
            logarithm += part / share * weighted_median([s.grad_norm for s in seen], weights)
            if len(seen) >= SPREAD_SEEN:
                loss_variance += (part * level * deviation([s.loss for s in seen])) ** 2
                norm_variance += (part * deviation([s.grad_norm for s in seen])) ** 2
        return Level(
            loss,
            math.exp(logarithm),
            math.sqrt(loss_variance) / loss,
            math.sqrt(norm_variance),
            frozenset(shares.keys() - known.keys()),
        )

    def accept(self, kinds: Mapping[str, KindOfClips], grad_norm: float) -> None:
        """A step with these kinds was taken; what is not above zero has no logarithm and tells nothing."""
        for name, kind in kinds.items():
            if kind.loss > 0 and grad_norm > 0:
                seen = self._seen.setdefault(name, deque(maxlen=KEPT))
                seen.append(_Seen(math.log(kind.loss), math.log(grad_norm), kind.share))

    def _of(self, name: str) -> deque[_Seen]:
        return self._seen.get(name, deque())

    def state(self) -> dict[str, Any]:
        return {
            name: [[one.loss, one.grad_norm, one.share] for one in seen]
            for name, seen in self._seen.items()
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self._seen = {
            name: deque((_Seen(*one) for one in seen), maxlen=KEPT) for name, seen in state.items()
        }


def deviation(values: list[float]) -> float:
    """The standard deviation of normal values, from their median absolute deviation."""
    middle = median(values)
    return GAUSSIAN * median(abs(value - middle) for value in values)


def weighted_median(values: list[float], weights: list[float]) -> float:
    """The value at which half of the weight is reached."""
    half, reached = sum(weights) / 2, 0.0
    for value, weight in sorted(zip(values, weights, strict=True)):
        reached += weight
        if reached >= half:
            return value
    raise ValueError("no values")
