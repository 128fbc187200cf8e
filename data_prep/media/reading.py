"""Frames of a source or of a clip in order, with their times, none held: what stages look through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation

from data_prep.stage import Workspace
from sora_train.data.decode import rgb
from sora_train.data.decode.frames import (
    COUNTED,
    INTERLACED,
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


@contextmanager
def open_row(row: Mapping[str, Any]) -> Iterator[Any]:
    """The bytes of a source, `path` [offset, offset + length), as a file; it may lie behind an address."""
    opened = RemoteRange if is_remote(row["path"]) else ByteRange
    with opened(row["path"], row["offset"], row["length"]) as file:
        yield file


@contextmanager
def open_clip(row: Mapping[str, Any], workspace: Workspace) -> Iterator[Any]:
    """The bytes of a clip that was cut, as a file."""
    path = Path(workspace.files) / row["file"]
    with ByteRange(str(path), 0, row["bytes"]) as file:
        yield file


def frames_between(
    file: Any, begin: float, end: float, traits: str, start: float, fps: float, *, is_seekable: bool
) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """(time, seconds shown, frame) of the frames whose time is in [begin, end), seconds after the first frame.

    `traits`, `start` and `fps` are the source's as probed. Interlaced ones are made whole. Raises BadClip where a frame
    of the range is damaged.
    """
    half = 0.25 / (fps or 25.0)
    words = traits.split()
    with blaming_the_clip(file), open_container(file) as container:
        stream = video_stream(container)
        if is_seekable and begin > 1.0:
            tick = float(stream.time_base or 1)
            # Interlaced frames are made of their neighbours.
            early = begin + start - (2 / (fps or 25.0) if INTERLACED in words else 0.0)
            container.seek(int(early / tick), stream=stream, backward=True)
        found = False
        for index, frame in enumerate(progressive(decoded(container, stream))):
            counted = COUNTED in words or frame.time is None
            time = index / (fps or 25.0) if counted else frame.time - start
            if time >= end - half:
                return
            if time >= begin - half:
                found = True
                yield time, shown_for(frame) or 1 / (fps or 25.0), frame
        if not found:
            raise BadClip(
                "too_few_frames", f"no frame is shown between {begin:.3f} and {end:.3f} s"
            )


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
