"""What is asked of a model, and the clip that came of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sora_train.data.shapes.captions import ACTIONS
from sora_train.data.shapes.scene import Prompt
from sora_train.data.shapes.world import PALETTE, SHAPES


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


_WORDINGS = {wording: motion for motion, wordings in ACTIONS.items() for wording in wordings}
_ONE_THING = re.compile(rf"(?:a )?(?:\w+ )?(\w+) (\w+) ({'|'.join(_WORDINGS)})\b")


def asked_by(prompt: str) -> Prompt | None:
    """What a prompt in the words of the shapes world asks of its single thing; None for other prompts."""
    found = _ONE_THING.match(prompt)
    if found is None or found[1] not in PALETTE or found[2] not in SHAPES:
        return None
    return Prompt(prompt, found[1], found[2], _WORDINGS[found[3]])
