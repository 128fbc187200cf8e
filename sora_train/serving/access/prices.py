"""What a video costs: seconds delivered, by model and size."""

from dataclasses import dataclass
from typing import Any

from sora_train.serving.jobs.job import Asked, Job
from sora_train.serving.settings import PriceSettings

CLASSES = (240, 360, 480, 720, 1080, 1440, 2160)
"""Pixels of the shorter side at which sizes without a price of their own are told apart."""


@dataclass(frozen=True)
class Prices:
    """The rows of the settings."""

    rows: tuple[PriceSettings, ...] = ()
    currency: str = "USD"

    def row(self, model: str, size: tuple[int, int]) -> PriceSettings | None:
        """The smallest row of this model, else of `*`, that holds the size."""
        side = min(size)
        for name in (model, "*"):
            fitting = [row for row in self.rows if row.model == name and row.up_to >= side]
            if fitting:
                return min(fitting, key=lambda row: row.up_to)
        return None

    def of(self, model: str, size: tuple[int, int], seconds: float) -> dict[str, Any]:
        """The usage of so many seconds: model, size class, seconds, cost and currency."""
        row = self.row(model, size)
        classes = [side for side in CLASSES if side >= min(size)]
        side = row.up_to if row else min(classes, default=max(CLASSES))
        cost = row.per_second * seconds if row else 0.0
        return {
            "model": model,
            "size_class": f"{side}p",
            "seconds": round(seconds, 3),
            "cost": round(cost, 6),
            "currency": self.currency,
        }

    def estimate(self, asked: Asked) -> dict[str, Any]:
        """What the job will cost at most."""
        return self.of(asked.model, asked.size, asked.seconds)

    def usage(self, job: Job, facts: dict[str, Any]) -> dict[str, Any]:
        """What a completed job costs: the seconds that it made, of an extension the new ones alone.

        Args:
            facts: measured by the worker: `size`, and `new_seconds`, without what an extension extends.
        """
        width, height = facts["size"]
        return self.of(job.asked.model, (int(width), int(height)), float(facts["new_seconds"]))
