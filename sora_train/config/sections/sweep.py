"""How `-m` chooses the runs of a sweep; nothing that a run trains depends on it."""

from typing import Literal

from pydantic import Field

from sora_train.config.sections.base import Section


class SweepConfig(Section):
    method: Literal["grid", "random", "tpe"] = "grid"
    """`grid`: every combination of values; `random` and `tpe` (Optuna) draw `sweep.trials` combinations, also from
    intervals."""
    trials: int = Field(20, ge=1)
    """Number of runs of a search, counting those of earlier calls in the same folder."""
    metric: str = "val/loss"
    """Metric that a search compares: its last value in a run (docs/metrics.md)."""
    goal: Literal["minimize", "maximize"] = "minimize"
    """Whether lower or higher values of `sweep.metric` are better."""
    seed: int = Field(0, ge=0)
    """Seed of a search; run n depends on it, on n and on the results so far."""
    at_once: int = Field(1, ge=1)
    """Runs at the same time on this machine, which divide its GPUs among them."""
