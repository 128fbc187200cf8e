"""Small clip files whose every frame says its own number, for the tests of the data plane."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from sora_train.data.video_io import encode_h264

LEVEL = 6
"""Grey levels between one frame and the next."""


def numbered(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames of one grey each, `LEVEL` brighter than the one before."""
    levels = (16 + LEVEL * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def number_of(frame: np.ndarray) -> int:
    """The number a decoded frame says."""
    return round((float(frame.mean()) - 16) / LEVEL)


def write_clip(
    path: Path, count: int = 9, fps: float = 8, height: int = 32, width: int = 48
) -> Path:
    encode_h264(numbered(count, height, width), fps, path)
    return path


def write_timed(path: Path, times_ms: list[int]) -> Path:
    """A Matroska clip of variable rate with B-frames: frame i is shown from `times_ms[i]` on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=25, options={"crf": "10", "bf": "2", "g": "8"}
        )
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, time in zip(numbered(len(times_ms)), times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def real_clips() -> Path:
    """The folder of real clips; skips where it is not given."""
    folder = os.environ.get("SORA_TEST_VIDEOS")
    if not folder:
        pytest.skip("SORA_TEST_VIDEOS is not set: no real clips to decode")
    return Path(folder)
