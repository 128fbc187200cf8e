"""What a video shows when: prompts that hold from a moment on, and frames that are given at one."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Cue:
    """What changes at one moment of a video."""

    at: float
    """Seconds from the start."""
    prompt: str = ""
    """Holds from here on until the next cue with one."""
    frames: np.ndarray | None = None
    """uint8 (F, H, W, 3) shown from `at` on, at the video's rate and size."""


@dataclass(frozen=True)
class Script:
    """The cues of one video in the order of time; a plain prompt is `Script.of(prompt)`."""

    cues: tuple[Cue, ...]

    def __post_init__(self) -> None:
        if any(cue.at < 0 for cue in self.cues):
            raise ValueError("a cue lies before the start of the video")
        if any(later.at < earlier.at for earlier, later in pairwise(self.cues)):
            raise ValueError("the cues are not in the order of time")

    @classmethod
    def of(cls, prompt: str) -> "Script":
        """One prompt from beginning to end."""
        return cls((Cue(0.0, prompt),))

    def prompt_at(self, seconds: float) -> str:
        """The prompt that holds then: the newest so far; before the first of all, that first one."""
        prompts = [(cue.at, cue.prompt) for cue in self.cues if cue.prompt]
        past = [prompt for at, prompt in prompts if at <= seconds]
        return past[-1] if past else prompts[0][1] if prompts else ""

    def given(self, fps: float, frames: int) -> list[tuple[int, np.ndarray]]:
        """The given frames of a video of so many, each run with the number of its first frame.

        A run ends with the video at the latest, and where the next one begins.
        """
        runs = [(round(cue.at * fps), cue.frames) for cue in self.cues if cue.frames is not None]
        starts = [first for first, _ in runs] + [frames]
        cut = [
            (first, run[: max(0, min(frames, end) - first)])
            for (first, run), end in zip(runs, starts[1:], strict=True)
        ]
        return [(first, run) for first, run in cut if len(run)]
