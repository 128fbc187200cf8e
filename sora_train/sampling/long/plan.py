"""Which frames of a long video each window makes, and which it is shown.

A window is a clip of the model's own length. The first makes all its frames; each later one begins with `history`
frames that are there already and makes those behind them. A window begins at a frame whose number is a multiple of
the VAE's frame step, and history has 1 + k * step frames: so latent frames of all windows end at the same frames of the
video, and the head of a window has the phase of a clip's head (docs/objective.md).
"""

from dataclasses import dataclass

from sora_train.errors import UserError


@dataclass(frozen=True)
class Window:
    """Frames of the video, counted from 0."""

    start: int
    """Its first frame."""
    fresh: int
    """The first frame that it makes; those from `start` up to it are its history."""
    end: int
    """The frame after the last that it makes; what the model makes beyond is dropped."""

    @property
    def history(self) -> int:
        """Frames that it is shown."""
        return self.fresh - self.start


def plan_windows(frames: int, length: int, history: int, step: int) -> list[Window]:
    """Windows of `length` frames that make every frame of a video once, in order.

    Args:
        frames: of the video.
        length: of a window, 1 + k * step.
        history: frames a window is shown; fewer where these are not 1 + k * step, or leave it nothing to make.
        step: clips that the VAE takes have 1 + k * step frames.

    Raises:
        UserError: a window of one frame, with more frames to make.
    """
    if frames > length <= step:
        raise UserError(
            f"a video of {frames} frames is made of windows, and clips of this model have {length}; give --frames "
            f"{1 + 2 * step} or more for the windows, or take a model that was trained on video"
        )
    shown = 1 + (min(history, length - step) - 1) // step * step
    windows = [Window(0, 0, min(length, frames))]
    while windows[-1].end < frames:
        done = windows[-1].end
        windows.append(Window(done - shown, done, min(done - shown + length, frames)))
    return windows


def window_length(frames: int, length: int, step: int) -> int:
    """`length`, or the shortest clip that holds all frames of a shorter video."""
    return min(length, 1 + -(-(frames - 1) // step) * step)
