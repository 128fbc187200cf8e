"""Writes clips as H.264 files that every player opens, and that say which colours they mean."""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from sora_train.base.files import renamed_when_whole
from sora_train.errors import UserError

# H.264 counts time in fractions; this holds 30000/1001 and the like exactly.
_MAX_RATE_DENOMINATOR = 1001
# The clock of clips whose frames are not shown equally long, as MPEG has it.
_CLOCK = Fraction(1, 90_000)
# With its defaults x264 encodes one frame of 48 x 48 in fifty differently from time to time: its
# look-ahead for B-frames and macroblock trees reads past the edge of pictures that small.
_REPEATABLE = "bframes=0:mbtree=0"


@dataclass(frozen=True)
class Encoding:
    """How H.264 is made: `crf` the quality (lower is better), `gop` the most frames between key frames (0: x264's)."""

    crf: int = 18
    gop: int = 0


def encode_h264(
    frames: np.ndarray, fps: float, path: Path | str | io.BytesIO, crf: int = 18
) -> None:
    """Encode uint8 (T, H, W, 3) RGB as mp4: yuv420p, tagged BT.709, index at the front.

    Equal input gives equal bytes. A file is written under a temporary name, then renamed. Raises
    UserError on an odd height or width, which 4:2:0 colour cannot hold.
    """
    num_frames, height, width, channels = frames.shape
    assert frames.dtype == np.uint8 and channels == 3 and num_frames > 0, (
        "frames are uint8 (T, H, W, 3)"
    )
    if height % 2 or width % 2:
        raise UserError(
            f"a clip of {height}x{width} cannot be written as H.264: height and width must be even; "
            f"use {height + height % 2}x{width + width % 2}"
        )
    if isinstance(path, io.BytesIO):
        # Moving the index to the front reopens the file by its name, so it needs one.
        with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
            _encode(((None, frame) for frame in frames), fps, file.name, Encoding(crf))
            path.write(file.read())
        return
    with renamed_when_whole(Path(path)) as partial:
        _encode(((None, frame) for frame in frames), fps, str(partial), Encoding(crf))


def stream_h264(
    frames: Iterable[tuple[float | None, np.ndarray]], fps: float, path: Path, encoding: Encoding
) -> None:
    """`encode_h264` of frames that come one by one: (seconds, or None for an even rate; uint8 (H, W, 3) RGB).

    All have the size of the first, which is even.
    """
    with renamed_when_whole(path) as partial:
        _encode(frames, fps, str(partial), encoding)


@contextlib.contextmanager
def open_h264(
    path: Path, fps: float, encoding: Encoding | None = None
) -> Iterator[Callable[[np.ndarray], None]]:
    """`stream_h264` for whoever has the frames in hand one by one: what is yielded takes the next, uint8 (H, W, 3)."""
    with (
        renamed_when_whole(path) as partial,
        _opened(str(partial), fps, encoding or Encoding()) as write,
    ):
        yield lambda frame: write(None, frame)


def _encode(
    frames: Iterable[tuple[float | None, np.ndarray]], fps: float, file: str, encoding: Encoding
) -> None:
    with _opened(file, fps, encoding) as write:
        for time, rgb in frames:
            write(time, rgb)


@contextlib.contextmanager
def _opened(
    file: str, fps: float, encoding: Encoding
) -> Iterator[Callable[[float | None, np.ndarray], None]]:
    """A file that takes frames with their times, and ends whole unless the block raises."""
    rate = Fraction(fps).limit_denominator(_MAX_RATE_DENOMINATOR)
    streams: list[av.VideoStream] = []
    indices = itertools.count()
    with av.open(file, mode="w", format="mp4", options={"movflags": "+faststart"}) as container:

        def write(time: float | None, rgb: np.ndarray) -> None:
            if not streams:
                streams.append(_stream(container, rate, rgb.shape, encoding))
                if time is not None:
                    streams[0].codec_context.time_base = _CLOCK
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            frame = frame.reformat(
                format="yuv420p",
                src_colorspace=Colorspace.ITU709,
                dst_colorspace=Colorspace.ITU709,
                threads=1,
            )
            index = next(indices)
            if time is None:
                frame.pts, frame.time_base = index, 1 / rate
            else:
                frame.pts, frame.time_base = round(time / _CLOCK), _CLOCK
            container.mux(streams[0].encode(frame))

        yield write
        assert streams, "a clip has a frame"
        container.mux(streams[0].encode(None))


def _stream(
    container: av.container.OutputContainer,
    rate: Fraction,
    shape: tuple[int, ...],
    encoding: Encoding,
) -> av.VideoStream:
    keys = f":keyint={encoding.gop}" if encoding.gop else ""
    options = {
        "crf": str(encoding.crf),
        "preset": "veryfast",
        "x264-params": f"{_REPEATABLE}{keys}",
    }
    stream = container.add_stream("libx264", rate=rate, options=options)
    stream.height, stream.width = shape[:2]
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    # More threads would make the bytes depend on the machine.
    context.thread_count = 1
    context.colorspace = Colorspace.ITU709
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    context.color_range = ColorRange.MPEG
    return stream
