"""How `-m` goes through the values of a sweep; nothing that a run trains depends on it."""

from typing import Literal

from pydantic import Field

from sora_train.config.sections.base import Section


class SweepConfig(Section):
    method: Literal["grid", "random", "tpe"] = "grid"
    """`grid`: every combination; `random` and `tpe` (Optuna) draw `sweep.trials` of them, and also from intervals."""
    trials: int = Field(20, ge=1)
    """Runs of a search, those of earlier calls in the same folder counted."""
    metric: str = "val/loss"
    """What a search looks at: a metric of the run's last row that has it (docs/metrics.md)."""
    goal: Literal["minimize", "maximize"] = "minimize"
    """Whether less or more of it is better."""
    seed: int = Field(0, ge=0)
    """Seed of a search: trial n is drawn from it, n and the results so far."""
    at_once: int = Field(1, ge=1)
    """Runs side by side on this machine; its GPUs are shared out among them."""
