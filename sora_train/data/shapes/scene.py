"""What a clip of the shapes world shows, down to the last factor, and what a prompt asks a clip to show."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Thing:
    """One object: `x`, `y` where it starts, `radius` the largest it gets."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    angle: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Everything `render` needs and everything an oracle could be asked.

    `motion` is that of the first thing against the background; things of a pair are still.
    `travel` is its path in fractions of the frame (signed, x or y by the motion), `pan` the way
    the camera goes in fractions of the width. `phrasing` is the bit field of `captions.describe`.
    """

    things: tuple[Thing, ...]
    motion: str
    background: str
    camera: str
    relation: str | None
    lighting: str
    style: str
    caption: str
    phrasing: int
    num_frames: int
    fps: float
    height: int
    width: int
    travel: float
    pan: float
    phase: float
    key: str
    held_out: bool
    periods: float = 1.0
    """How often the motion plays in the clip; more than once where it goes on, once a second."""
    start: float = 0.0
    """Where in its period the motion is when the clip begins."""


@dataclass(frozen=True)
class Prompt:
    """A text and what a clip made from it must show."""

    text: str
    colour: str
    shape: str
    motion: str
