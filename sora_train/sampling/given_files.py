"""Images and videos that a user gives, cut to frames of a clip: their middle cropped to its shape, and resized."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sora_train.data.decode.frames import (
    BadClip,
    DecodeRequest,
    StorageFault,
    decode_frames,
)
from sora_train.data.decode.probe import Probe, ProbeRequest, probe_video
from sora_train.data.sample import Bucket
from sora_train.data.transforms import crop, sampled_frames
from sora_train.errors import UserError
from sora_train.sampling.pipeline import ClipShape

MAX_FRAMES = 4096
"""Longest video read, in frames at the clip's rate: it is held in memory whole."""
SAME_ASPECT = 0.01
"""By so much shapes may differ before anything is told of the cropping."""


@dataclass(frozen=True)
class GivenFile:
    """An image or a video that a user named."""

    path: Path
    kind: str
    """image or video."""
    flag: str
    """How the user named it; errors begin with it."""
    probe: Probe

    @classmethod
    def open(cls, path: Path, kind: str, flag: str) -> "GivenFile":
        """Raises UserError where there is no such file, or it cannot be read."""
        if not path.is_file():
            raise UserError(f"{flag}: there is no file {path}; give the path of {_a(kind)}")
        request = ProbeRequest(0, path.name, str(path), 0, path.stat().st_size, kind)
        try:
            return cls(path, kind, flag, probe_video(request))
        except (BadClip, StorageFault) as error:
            raise UserError(f"{flag} {path} cannot be read as {_a(kind)}: {error}") from error

    def frames(self, shape: ClipShape, alpha_background: str) -> np.ndarray:
        """Its frames at the clip's rate and of the clip's size, uint8 (F, H, W, 3).

        Args:
            alpha_background: the colour that lies under transparency.
        """
        path, probe, count = self.path, self.probe, 1
        if self.kind == "video" and probe.fps > 0:
            counts = sampled_frames(np.array([probe.frames]), np.array([probe.fps]), shape.fps)
            count = int(counts[0])
        if count > MAX_FRAMES:
            raise UserError(
                f"{self.flag} {path} has {count} frames at {shape.fps:g} a second; cut it to {MAX_FRAMES} or fewer"
            )
        bucket = Bucket(count, shape.height, shape.width)
        request = DecodeRequest(
            row=0,
            key=path.name,
            path=str(path),
            offset=0,
            length=path.stat().st_size,
            kind=self.kind,
            times=tuple(i / shape.fps if shape.fps else 0.0 for i in range(count)),
            crop=crop(probe.height, probe.width, bucket, 0.5, 0.5),
            shown=(probe.height, probe.width),
            height=shape.height,
            width=shape.width,
            start=probe.start,
            fps=probe.fps,
            traits=probe.traits,
            alpha_background=alpha_background,
        )
        try:
            return decode_frames(request)
        except (BadClip, StorageFault) as error:
            raise UserError(
                f"{self.flag} {path} cannot be read as {_a(self.kind)}: {error}"
            ) from error

    def crop_note(self, shape: ClipShape) -> str:
        """A sentence where it has another shape than the clip, so that its sides are cut off; else nothing."""
        own, clips = self.probe.width / self.probe.height, shape.width / shape.height
        if abs(own / clips - 1) <= SAME_ASPECT:
            return ""
        return (
            f"{self.flag} {self.path} is {self.probe.width}x{self.probe.height} and the clip "
            f"{shape.width}x{shape.height}: its middle is shown, cropped to that shape and resized"
        )


def _a(kind: str) -> str:
    return "an image" if kind == "image" else "a video"
