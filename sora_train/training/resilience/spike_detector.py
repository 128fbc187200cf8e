"""Judges each step by two numbers, its loss and its gradient norm, before the optimizer sees it.

A value that is not finite is always bad. A spike is a value above

    exp(median + sigma * max(1.4826 * MAD, 0.1))        of the logarithms of the last good values

with median and MAD (median absolute deviation) over a window of steps that were taken. 1.4826 MAD is
a Gaussian's standard deviation (Rousseeuw & Croux 1993, doi:10.1080/01621459.1993.10476408); unlike
mean and variance, or averages of them (ZClip, arXiv:2504.02507), neither is moved by one outlier
(Leys et al. 2013, doi:10.1016/j.jesp.2013.03.013). Logarithms, since losses and norms spread in
proportion to their size: a loss in other units is judged alike. The least deviation of 0.1 keeps a
curve that hardly varies from being judged by its last digits.

Skipping and going back are PaLM's remedy (arXiv:2204.02311, section 5.1): the same steps with other
data do not spike again. The detector reads numbers that are the same on all ranks and draws nothing, so
all ranks come to one verdict. Its state is in the checkpoint.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from sora_train.config import SpikeDetectionConfig

GAUSSIAN = 1.4826
LEAST_DEVIATION = 0.1

Reason = Literal["", "non_finite", "loss_spike", "grad_norm_spike"]


@dataclass(frozen=True)
class StepVerdict:
    """The numbers of a step, their limits (inf: not judged), and why the step is bad, or an empty reason."""

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
        if self.reason == "loss_spike":
            return f"loss {self.loss:.6g} is above the limit {self.loss_limit:.6g}"
        return f"gradient norm {self.grad_norm:.6g} is above the limit {self.grad_norm_limit:.6g}"


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


class SpikeDetector:
    """The running statistic and the counters; `state()` goes into the checkpoint."""

    def __init__(self, cfg: SpikeDetectionConfig):
        self.cfg = cfg
        self.counters = SpikeCounters()
        self.accepted = 0
        self._losses: deque[float] = deque(maxlen=cfg.window)
        self._norms: deque[float] = deque(maxlen=cfg.window)

    def verdict(self, loss: float, grad_norm: float) -> StepVerdict:
        """Judge a step by its global numbers; the state is left as it is."""
        cfg = self.cfg
        limits = (
            self._limit(self._losses, cfg.spike_sigma),
            self._limit(self._norms, cfg.grad_norm_sigma),
        )
        reason: Reason = ""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            reason = "non_finite"
        elif loss > limits[0]:
            reason = "loss_spike"
        elif grad_norm > limits[1]:
            reason = "grad_norm_spike"
        return StepVerdict(loss, grad_norm, *limits, reason)

    def _limit(self, logarithms: deque[float], sigma: float) -> float:
        if not sigma or self.accepted < self.cfg.warmup or len(logarithms) < 2:
            return math.inf
        middle = median(logarithms)
        spread = GAUSSIAN * median(abs(value - middle) for value in logarithms)
        try:
            return math.exp(middle + sigma * max(spread, LEAST_DEVIATION))
        except OverflowError:
            return math.inf

    def accept(self, loss: float, grad_norm: float) -> None:
        """A step was taken. A value of zero or less has no logarithm and is not judged."""
        self.accepted += 1
        self.counters.in_a_row = 0
        for values, value in ((self._losses, loss), (self._norms, grad_norm)):
            if value > 0:
                values.append(math.log(value))

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
            "accepted": self.accepted,
            # The key's name in checkpoints since format 1.
            "tally": asdict(self.counters),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Restore a checkpoint's state; {} is that of a checkpoint from before there was a detector."""
        self.accepted = int(state.get("accepted", 0))
        self.counters = SpikeCounters(**state.get("tally", {}))
        self._losses = self._window(state.get("losses", ()))
        self._norms = self._window(state.get("grad_norms", ()))

    def _window(self, values: Iterable[float]) -> deque[float]:
        return deque(values, maxlen=self.cfg.window)
