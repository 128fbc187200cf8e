"""Frames of a source or of a clip in order, with their times, none held: what stages look through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

from data_prep.stage import Workspace
from sora_train.data.decode import rgb
from sora_train.data.decode.frames import (
    COUNTED,
    INTERLACED,
    SEEK_WORTH_SECONDS,
    BadClip,
    blaming_the_clip,
    decoded,
    open_container,
    progressive,
    shown_for,
    video_stream,
)
from sora_train.data.storage.ranges import ByteRange
from sora_train.data.storage.remote import RemoteRange, is_remote

BACKGROUND = "black"
# Frames a second of a file that does not say.
_RATE = 25.0


@contextmanager
def open_row(row: Mapping[str, Any]) -> Iterator[Any]:
    """The bytes of a source, `path` [offset, offset + length), as a file; it may lie behind an address."""
    opened = RemoteRange if is_remote(row["path"]) else ByteRange
    with opened(row["path"], row["offset"], row["length"]) as file:
        yield file


@contextmanager
def open_clip(row: Mapping[str, Any], workspace: Workspace) -> Iterator[Any]:
    """The bytes of a clip that was cut, as a file."""
    with ByteRange(str(workspace.files / row["file"]), 0, row["bytes"]) as file:
        yield file


Shown = tuple[float, float, av.VideoFrame]
"""When a frame is shown, in seconds after the first one, for how long, and the frame."""


def frames_between(
    file: Any,
    begin: float,
    end: float,
    traits: str,
    start: float,
    fps: float,
    *,
    is_seekable: bool,
    from_shown: bool = False,
) -> Iterator[Shown]:
    """The frames whose time is in [begin, end), seconds after the first frame of the file; interlaced ones made whole.

    `traits`, `start` and `fps` are the file's as probed. `from_shown`: the first is the one that is shown at `begin`,
    though its time be earlier. Raises BadClip where a frame of the range is damaged.
    """
    if is_seekable and begin > SEEK_WORTH_SECONDS:
        frames = _frames(file, begin, end, traits, start, fps, from_shown, sought=True)
        try:
            first = next(frames, None)
        except BadClip:
            first = None  # such as a frame at the place sought that needs one before it
        if first is not None and first[0] <= begin + 0.5 / (fps or _RATE):
            yield first
            yield from frames
            return
        # A seek may overshoot where the container has no index; decoding from the start is always right.
        file.seek(0)
    found = False
    for shown in _frames(file, begin, end, traits, start, fps, from_shown, sought=False):
        found = True
        yield shown
    if not found:
        raise BadClip("too_few_frames", f"no frame is shown between {begin:.3f} and {end:.3f} s")


def _frames(
    file: Any,
    begin: float,
    end: float,
    traits: str,
    start: float,
    fps: float,
    from_shown: bool,
    *,
    sought: bool,
) -> Iterator[Shown]:
    rate, words = fps or _RATE, traits.split()
    half = 0.25 / rate
    earlier: Shown | None = None
    with blaming_the_clip(file), open_container(file) as container:
        stream = video_stream(container)
        if sought:
            # Interlaced frames are made of their neighbours.
            early = begin + start - (2 / rate if INTERLACED in words else 0.0)
            container.seek(int(early / float(stream.time_base or 1)), stream=stream, backward=True)
        for index, frame in enumerate(progressive(decoded(container, stream))):
            by_count = COUNTED in words or frame.time is None
            time = index / rate if by_count else frame.time - start
            if time >= end - half:
                break
            shown = time, shown_for(frame) or 1 / rate, frame
            if time < begin - half:
                earlier = shown if from_shown else None
                continue
            if earlier is not None and time > begin + half:
                yield earlier
            earlier = None
            yield shown
        if earlier is not None:
            yield earlier


def picture(frame: av.VideoFrame) -> np.ndarray:
    """What a frame shows: uint8 (H, W, 3) RGB, upright, in SDR."""
    return rgb.shown(frame, BACKGROUND)


def small_picture(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """What a frame shows at this size, uint8 (height, width, 3) RGB: scaled by FFmpeg before its colours are read."""
    if rgb.is_turned(frame):
        height, width = width, height
    scaled = frame.to_ndarray(
        format="rgb24", width=width, height=height, interpolation=Interpolation.AREA, threads=1
    )
    return rgb.upright(scaled, frame)


def resized(shown: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture, uint8 (H, W, 3), at this size: itself where it has it already."""
    if shown.shape[:2] == (height, width):
        return shown
    image = Image.fromarray(np.ascontiguousarray(shown))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
