"""What a probe is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sora_train.evaluation.cases import Case, Sampled
from sora_train.evaluation.registry import Metric


@dataclass(frozen=True)
class Probe:
    name: str
    """The `group` of its cases."""
    metrics: Mapping[str, Metric]
    """The numbers that it gives."""
    ask: Callable[[int, int, int, float, int], list[Case]]
    """(frames, height, width, fps, most cases) -> what is to be sampled."""
    measure: Callable[[Sampled], dict[str, float]]
    """The metrics of one clip; those that cannot be measured on it are left out."""
    shapes_only: bool = True
    """Whether it is about runs on the shapes world."""
