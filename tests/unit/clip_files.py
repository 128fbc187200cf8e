"""Small clip files whose every frame says its own number, for the tests of the data plane."""

import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from sora_train.data.decode.video_io import encode_h264

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


# -- clips whose frames bear their number as a picture ------------------------------------------------

CODED_SIZE = (64, 128)
_BITS = 8


def coded(count: int) -> np.ndarray:
    """Frames whose number stands in them as two rows of four black or white blocks."""
    bits = (np.arange(count)[:, None] >> np.arange(_BITS)) & 1
    blocks = (16 + 220 * bits).astype(np.uint8).reshape(count, 2, 4)
    gray = blocks.repeat(CODED_SIZE[0] // 2, axis=1).repeat(CODED_SIZE[1] // 4, axis=2)
    return np.repeat(gray[..., None], 3, axis=3)


def code_of(frame: np.ndarray) -> int:
    """The number that a decoded frame of any size bears."""
    height, width = frame.shape[:2]
    rows, columns = [height // 4, 3 * height // 4], [(2 * i + 1) * width // 8 for i in range(4)]
    bits = frame[np.ix_(rows, columns)].mean(axis=2).ravel() > 128
    return int((bits << np.arange(_BITS)).sum())


def write_coded(
    path: Path,
    ticks: list[int],
    time_base: Fraction,
    *,
    codec: str = "libx264",
    turned: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """A clip whose frame i is shown from `ticks[i] * time_base` on, stored `turned` quarter turns."""
    with ordinary_scheduling():
        return _write_coded(path, ticks, time_base, codec, turned, options)


@contextmanager
def ordinary_scheduling() -> Iterator[None]:
    """SVT-AV1 makes the thread that encodes with it a real-time one, for good, if it may."""
    try:
        yield
    finally:
        if sys.platform == "linux":
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _write_coded(
    path: Path,
    ticks: list[int],
    time_base: Fraction,
    codec: str,
    turned: int,
    options: dict[str, str] | None,
) -> Path:
    images = np.rot90(coded(len(ticks)), turned, axes=(1, 2))
    with av.open(str(path), "w") as container:
        rate = round(1 / float(time_base) / max(1, ticks[1] - ticks[0]))
        stream = container.add_stream(codec, rate=rate, options=options or {"bf": "3", "g": "12"})
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = stream.time_base = time_base
        for image, tick in zip(images, ticks, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = tick, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turn(path: Path) -> Path:
    """Tell players of an mp4 to turn it a quarter clockwise."""
    data = bytearray(path.read_bytes())
    fixed = [1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30]
    turned = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]
    plain, other = (struct.pack(">9i", *values) for values in (fixed, turned))
    at = data.index(plain, data.index(b"tkhd"))
    data[at : at + len(plain)] = other
    path.write_bytes(data)
    return path


def skip_ticks(path: Path, ticks: int) -> Path:
    """Move the start of an mp4's edit list: the frames of its first `ticks` are not to be shown."""
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 4
    version, entries, length, media_time = struct.unpack(">IIIi", data[at : at + 16])
    assert version == 0 and entries == 1, "one edit, as libav writes it for B-frames"
    clock = data.index(b"mdhd") + 16
    media_rate, movie_rate = (
        int.from_bytes(data[place : place + 4], "big")
        for place in (clock, data.index(b"mvhd") + 16)
    )
    length -= ticks * movie_rate // media_rate
    data[at + 8 : at + 16] = struct.pack(">Ii", length, media_time + ticks)
    path.write_bytes(data)
    return path


def inflate(data: bytes, factor: int = 10) -> bytes:
    """An mp4 whose header promises `factor` times the frames, and the time for them."""
    data = bytearray(data.replace(b"edts", b"free"))
    for box, place in ((b"stts", 12), (b"mdhd", 20), (b"mvhd", 20)):
        at = data.index(box) + place
        value = int.from_bytes(data[at : at + 4], "big")
        data[at : at + 4] = (value * factor).to_bytes(4, "big")
    return bytes(data)
