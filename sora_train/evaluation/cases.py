"""What is asked of a model, and the clip that came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sora_train.data.shapes.scene import Prompt


@dataclass(frozen=True)
class Case:
    """One clip to be sampled: from which prompt, by which operation, with which frames given."""

    group: str
    """The operation, or the probe that asks; a folder of the results."""
    prompt: str
    op: str = "t2v"
    source: np.ndarray | None = None
    """uint8 (F, H, W, 3): of it come the frames given, the loop's still, or what is edited."""
    head: int = 0
    """Latent frames of the source that are given to an extension; 0: half of the clip's."""
    asked: Prompt | None = None
    """What a clip of the shapes world must show."""
    facts: Any = None
    """What a probe knows of it."""


@dataclass(frozen=True)
class Sampled:
    """A clip with what is known about how it was made."""

    case: Case
    clip: np.ndarray
    """uint8 (F, H, W, 3), as a user gets it."""
    fps: float
    file: str = ""
    """Below the folder of the results."""
    seams: tuple[int, ...] = ()
    """First frames behind a border between given and made ones."""
    given: np.ndarray | None = None
    """Frames that were given, and `kept`, what the model itself made of them."""
    kept: np.ndarray | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    """Its metrics, by name."""
