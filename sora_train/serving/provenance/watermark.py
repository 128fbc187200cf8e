"""An invisible mark in a video's frames that its key finds again after scaling, cropping and compressing.

A pattern of waves (pattern.py) is added to the luma of every frame, more of it where the frame is quiet. Of all places
where the pattern may lie the one is taken at which the video resembles it most already, which costs the mark nothing:
whoever detects it tries all of them anyway.
"""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

import av
import numpy as np
from PIL import Image

from sora_train.base.files import renamed_when_whole
from sora_train.errors import Fault, UserError
from sora_train.serving.provenance import pattern
from sora_train.serving.provenance.detection import GRID, Detection, detect, scores, spectrum
from sora_train.serving.provenance.whitening import (
    looked_at,
    quietness,
    small_luma,
)

STRENGTH, STRENGTH_OF_SMALL = 2.15, 2.9
"""Root mean square of the mark in 8-bit levels of luma; small is below FULL pixels on the short side."""
FULL = 256
CRF = 12
"""Of the marked file: what H.264 adds stays well below the mark."""
MIN_KEY_BYTES = 16
_PLANAR = ("yuv420p", "yuvj420p")


class Watermark:
    """Marks videos with a secret key and finds its marks; nothing else than the key is kept."""

    def __init__(self, key: bytes):
        if len(key) < MIN_KEY_BYTES:
            raise UserError(
                f"a watermark's key has at least {MIN_KEY_BYTES} bytes, not {len(key)}; "
                "make one with `openssl rand -hex 32`"
            )
        self._phases = pattern.phases(key)

    @classmethod
    def made(cls, path: Path) -> "Watermark":
        """`read` of a file that is made where it is missing: a key drawn by the system, for its owner alone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent
        ) as file:  # only its owner can read it
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)  # unlike a rename, it leaves the key of whoever was first
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> "Watermark":
        """The watermark whose key is what a file holds, without space around it. Raises UserError."""
        try:
            key = path.read_bytes().strip()
        except OSError as error:
            raise UserError(
                f"the watermark's key {path} cannot be read: {error.strerror}; check its path"
            ) from None
        try:
            return cls(key)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    def mark(self, source: Path, target: Path) -> None:
        """Write the mp4 `source` with the mark: its pictures encoded again as H.264, other streams as they are.

        The source is read twice, frame by frame. The target appears whole.

        Raises:
            UserError: the source cannot be decoded.
            Fault: it cannot be encoded.
        """
        coefficients = self._placed(looked_at(source))
        with renamed_when_whole(target) as partial:
            try:
                _encode(source, partial, coefficients)
            except av.FFmpegError as error:
                raise Fault(f"{source} cannot be encoded with its watermark: {error}") from error

    def detect(self, path: Path) -> Detection:
        """Whether a video has the mark. Raises UserError where it cannot be decoded."""
        return detect(looked_at(path), self._phases)

    def _placed(self, picture: np.ndarray) -> np.ndarray:
        """The pattern's coefficients for a video of this flattened mean, at the place that it resembles most."""
        step = 1 / min(picture.shape)
        number = int(min(picture.shape) < pattern.SMALL)
        surface = scores(list(spectrum(picture, step))[number], self._phases)
        down, right = np.unravel_index(surface.argmax(), surface.shape)
        waves = self._phases * pattern.band(number, step)
        return pattern.shifted(waves, down / GRID, right / GRID)


def _encode(source: Path, target: Path, coefficients: np.ndarray) -> None:
    with (
        av.open(str(source)) as given,
        av.open(str(target), "w", format="mp4", options={"movflags": "+faststart"}) as made,
    ):
        video = given.streams.video[0]
        video.thread_type = "SLICE"
        out = _video_stream(made, video)
        copied = {
            stream.index: made.add_stream_from_template(stream)
            for stream in given.streams
            if stream.type in ("audio", "subtitle")
        }
        mark: np.ndarray | None = None
        for packet in given.demux([video, *(given.streams[index] for index in copied)]):
            if packet.stream.index in copied:
                if packet.dts is not None:
                    packet.stream = copied[packet.stream.index]
                    made.mux(packet)
                continue
            for frame in packet.decode():
                assert isinstance(frame, av.VideoFrame), "the packet is of the video"
                if mark is None:
                    mark = pattern.drawn(coefficients, frame.height, frame.width)
                made.mux(out.encode(marked(frame, mark)))
        made.mux(out.encode(None))


def _video_stream(made: av.container.OutputContainer, video: av.VideoStream) -> av.VideoStream:
    given = video.codec_context
    out = made.add_stream("libx264", rate=video.average_rate, options={"crf": str(CRF)})
    out.width, out.height, out.pix_fmt = given.width, given.height, "yuv420p"
    context = out.codec_context
    if video.time_base is not None:
        context.time_base = video.time_base
    context.colorspace, context.color_range = given.colorspace, given.color_range
    context.color_primaries, context.color_trc = given.color_primaries, given.color_trc
    return out


def marked(frame: av.VideoFrame, mark: np.ndarray) -> av.VideoFrame:
    """A frame with `mark`, whose root mean square is 1, in its luma."""
    height, width = mark.shape
    if frame.format.name not in _PLANAR:
        frame = frame.reformat(format="yuv420p", threads=1)
    planes = frame.to_ndarray()
    quiet = quietness(small_luma(frame)).astype(np.float32)
    if quiet.shape != mark.shape:
        quiet = np.asarray(
            Image.fromarray(quiet).resize((width, height), Image.Resampling.BILINEAR)
        )
    change = mark * quiet
    strength = STRENGTH if min(mark.shape) >= FULL else STRENGTH_OF_SMALL
    change *= strength / max(float(np.sqrt(np.mean(change * change))), 1e-9)
    planes[:height] = np.clip(np.rint(planes[:height] + change), 0, 255)
    result = av.VideoFrame.from_ndarray(planes, format=frame.format.name)
    result.pts, result.time_base = frame.pts, frame.time_base
    result.colorspace, result.color_range = frame.colorspace, frame.color_range
    return result
