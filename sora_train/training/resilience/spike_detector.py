"""Judges each step by two numbers, its loss and its gradient norm, before the optimizer sees it.

A value that is not finite is always bad. A spike is a value above

    level * exp(median + sigma * max(deviation, 0.1))

where the level is what is expected of a step with the kinds of clips that this one holds (kind_levels.py), so that a
rare bucket or a high noise level is no spike. Median and deviation, 1.4826 MAD (median absolute deviation), are those
of the logarithms of value / level over a window of steps that were taken; where its kinds vary more than the steps of
the window do, theirs is the deviation. Unlike mean and variance, or averages of them (ZClip, arXiv:2504.02507), neither
is moved by one outlier (Leys et al. 2013, doi:10.1016/j.jesp.2013.03.013). Logarithms, since losses and norms spread in
proportion to their size: a loss in other units is judged alike. The least deviation of 0.1 keeps a curve that hardly
varies from being judged by its last digits. Of a step's loss the part of kinds that were not met before is left out,
and a step most of which is of such kinds is taken.

Skipping and going back are PaLM's remedy (arXiv:2204.02311, section 5.1): the same steps with other
data do not spike again. The detector reads numbers that are the same on all ranks and draws nothing, so
all ranks come to one verdict. Its state is in the checkpoint.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from sora_train.config import SpikeDetectionConfig
from sora_train.training.outputs.step_metrics import KindOfClips
from sora_train.training.resilience.kind_levels import (
    KindLevels,
    deviation,
)

LEAST_DEVIATION = 0.1

Reason = Literal["", "non_finite", "loss_spike", "grad_norm_spike"]


@dataclass(frozen=True)
class Limits:
    """What a step is compared with; inf: not compared."""

    loss: float = math.inf
    grad_norm: float = math.inf
    unjudged: frozenset[str] = frozenset()
    """Kinds that have no level yet: their part of the loss is not judged."""


@dataclass(frozen=True)
class StepVerdict:
    """The numbers of a step that are judged, their limits, and why the step is bad, or an empty reason."""

    loss: float
    grad_norm: float
    loss_limit: float
    grad_norm_limit: float
    reason: Reason

    @property
    def bad(self) -> bool:
        return self.reason != ""

    def sentence(self) -> str:
        if self.reason == "non_finite":
            return (
                f"loss {self.loss:.6g} and gradient norm {self.grad_norm:.6g} are not both finite"
            )
        what, value, limit = (
            ("loss", self.loss, self.loss_limit)
            if self.reason == "loss_spike"
            else ("gradient norm", self.grad_norm, self.grad_norm_limit)
        )
        return f"{what} {value:.6g} is above the limit {limit:.6g} for what the step holds"


@dataclass
class SpikeCounters:
    """Counts since step 0, including steps that a roll-back took back."""

    skipped: int = 0
    """Steps skipped."""
    in_a_row: int = 0
    """Steps skipped since the last good one."""
    lost_clips: int = 0
    """Clips that were not trained because of a skip or a roll-back."""
    rollbacks: int = 0
    """How often the run went back."""


def judge(loss: float, judged: float, grad_norm: float, limits: Limits) -> StepVerdict:
    """The verdict on a step's global numbers; `judged` is the part of the loss that is compared with its limit."""
    reason: Reason = ""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return StepVerdict(loss, grad_norm, limits.loss, limits.grad_norm, "non_finite")
    if judged > limits.loss:
        reason = "loss_spike"
    elif grad_norm > limits.grad_norm:
        reason = "grad_norm_spike"
    return StepVerdict(judged, grad_norm, limits.loss, limits.grad_norm, reason)


class SpikeDetector:
    """The running statistic and the counters; `state()` goes into the checkpoint."""

    def __init__(self, cfg: SpikeDetectionConfig):
        self.cfg = cfg
        self.counters = SpikeCounters()
        self.accepted = 0
        self._kinds = KindLevels()
        # Logarithms of what was accepted, in units of what was expected.
        self._losses: deque[float] = deque(maxlen=cfg.window)
        self._norms: deque[float] = deque(maxlen=cfg.window)

    def limits(self, shares: Mapping[str, float] | None = None) -> Limits:
        """The limits of the next step, which holds these shares of kinds; the state is left as it is."""
        level = self._kinds.expected(shares or {})
        if level is None:
            return Limits()
        cfg = self.cfg
        return Limits(
            level.loss * self._factor(self._losses, cfg.spike_sigma, level.loss_deviation),
            level.grad_norm
            * self._factor(self._norms, cfg.grad_norm_sigma, level.grad_norm_deviation),
            level.unknown,
        )

    def _factor(self, logarithms: deque[float], sigma: float, of_kinds: float) -> float:
        if not sigma or self.accepted < self.cfg.warmup or len(logarithms) < 2:
            return math.inf
        spread = max(deviation(list(logarithms)), of_kinds, LEAST_DEVIATION)
        try:
            return math.exp(median(logarithms) + sigma * spread)
        except OverflowError:
            return math.inf

    def accept(
        self, loss: float, grad_norm: float, kinds: Mapping[str, KindOfClips] | None = None
    ) -> None:
        """A step was taken. A value of zero or less has no logarithm and is not judged."""
        self.accepted += 1
        self.counters.in_a_row = 0
        kinds = kinds or {}
        level = self._kinds.expected({name: kind.share for name, kind in kinds.items()})
        if level is not None:
            unjudged = sum(kinds[name].share * kinds[name].loss for name in sorted(level.unknown))
            for values, value, expected in (
                (self._losses, loss - unjudged, level.loss),
                (self._norms, grad_norm, level.grad_norm),
            ):
                if value > 0:
                    values.append(math.log(value) - math.log(expected))
        self._kinds.accept(kinds, grad_norm)

    def skip(self, clips: int) -> None:
        """A step of so many clips was not taken."""
        self.counters.skipped += 1
        self.counters.in_a_row += 1
        self.counters.lost_clips += clips

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row were skipped that the weights are to blame, not one batch."""
        return self.counters.in_a_row >= self.cfg.max_skips

    def metrics(self) -> dict[str, float]:
        return {
            "train/skipped": float(self.counters.skipped),
            "train/rollbacks": float(self.counters.rollbacks),
            "train/lost_clips": float(self.counters.lost_clips),
        }

    def state(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._norms),
            "kinds": self._kinds.state(),
            "accepted": self.accepted,
            # The key's name in checkpoints since format 1.
            "tally": asdict(self.counters),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint's state; {} is that of a checkpoint from before there was a detector.

        One from before there were kinds holds values that are in units of nothing: the statistic begins anew.
        """
        self.counters = SpikeCounters(**state.get("tally", {}))
        known = state if "kinds" in state else {}
        self.accepted = int(known.get("accepted", 0))
        self._losses = self._window(known.get("losses", ()))
        self._norms = self._window(known.get("grad_norms", ()))
        self._kinds.load(known.get("kinds", {}))

    def _window(self, values: Iterable[float]) -> deque[float]:
        return deque(values, maxlen=self.cfg.window)
