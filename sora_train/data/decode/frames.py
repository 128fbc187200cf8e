"""Probes clips for the manifest and decodes their frames at a bucket's size. Pure functions.

They run in child processes that can be killed, so nothing here may import torch or keep state.
Frames are chosen by presentation time, never by index, because containers give wrong counts and rates.
Times are seconds after the clip's first frame.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sora_train.data.storage.ranges import ByteRange, StorageFault, digest_of_ends

if TYPE_CHECKING:
    from sora_train.data.manifest import Stamp
    from sora_train.data.storage.retry import ReadPolicy

av.logging.set_level(av.logging.PANIC)

# Matroska rounds times to a millisecond, so a frame may begin up to half of one late.
TIME_TOLERANCE = 1e-3
# A seek costs about as much as decoding a second of video from the start.
SEEK_WORTH_SECONDS = 1.0
# The largest batch of decoders that return whole batches: a minute of 1080p would be 6 GB.
BATCH_BYTES = 1 << 28
# Frame intervals that differ from the median by more than this share of it make a rate variable.
VARIABLE_RATE = 0.2
LONGEST_DETAIL = 200
_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")


class BadClip(Exception):
    """The clip itself is at fault: it cannot be decoded, or is not what the manifest says."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@contextmanager
def blaming_the_clip(file: Any) -> Iterator[None]:
    """Turns every error into BadClip, but where reading the bytes of `file` failed into StorageFault.

    Which one it is cannot be told from the error: a damaged header makes libav ask for more memory
    than there is, and its errors are of the kinds that a disk's are.
    """
    try:
        yield
    except StorageFault:
        raise
    except Exception as error:
        if file.fault:
            raise StorageFault(file.fault) from error
        if isinstance(error, BadClip):
            raise
        raise BadClip("unreadable", in_words(error)) from error


def in_words(error: Exception) -> str:
    """A library's error as the end of a sentence, without the objects it names."""
    if isinstance(error, UnidentifiedImageError):
        return "the file holds no picture of a known form"
    if isinstance(error, MemoryError):
        return "decoding it asks for more memory than there is"
    text = error.strerror if isinstance(error, av.error.FFmpegError) else str(error)
    text = " ".join(_OBJECT.sub("the file", text or "").split())
    return text[:LONGEST_DETAIL] or type(error).__name__


@dataclass(frozen=True)
class ProbeRequest:
    """Asks for the Probe of a byte range of a file; `count` is `decode`, `packets` or `header`."""

    row: int
    key: str
    path: str
    offset: int
    length: int
    kind: str
    count: str = "decode"


@dataclass(frozen=True)
class Probe:
    """The manifest's figures of a clip: height and width as displayed, `start` the first frame's own time."""

    codec: str
    frames: int
    fps: float
    vfr: bool
    height: int
    width: int
    rotation: int
    duration: float
    start: float
    digest: str


@dataclass(frozen=True)
class DecodeRequest:
    """Asks for the frames shown at `times`, of `crop` (top, left, height, width), resized to height x width.

    `crop` is in displayed pixels of a frame of `shown` (height, width).
    """

    row: int
    key: str
    path: str
    offset: int
    length: int
    kind: str
    times: tuple[float, ...]
    crop: tuple[float, float, float, float]
    shown: tuple[int, int]
    height: int
    width: int
    rotation: int = 0
    start: float = 0.0
    fps: float = 0.0
    backend: str = "pyav"
    reading: ReadPolicy | None = None
    """The retries and cache for a `path` that is an address; None where it is a local file."""
    digest: str = ""
    """The digest of the bytes as indexed, which remote bytes must have."""
    data: bytes | None = None
    """The bytes, where they are in memory already."""
    stamp: Stamp | None = None
    """Size and fingerprint of a remote shard, so that a cache can keep it block by block."""


def probe_video(request: ProbeRequest) -> Probe:
    """The manifest's figures of a clip, from its decoded frames or its packets.

    With `header` they come from the container's header and the first frame. Raises BadClip
    (`unreadable`) and StorageFault.
    """
    with ByteRange(request.path, request.offset, request.length) as file:
        return probe_file(file, request)


def probe_file(file: Any, request: ProbeRequest) -> Probe:
    """`probe_video` of an open file, whose `fault` names a failure of storage."""
    with blaming_the_clip(file):
        digest = _digest(file, request)
        file.seek(0)
        if request.kind == "image":
            return _probe_image(file, digest)
        return _probe_stream(file, request.count, digest)


def _digest(file: Any, request: ProbeRequest) -> str:
    """SHA-256 of the bytes; of their number and their two ends where only the header is read."""
    if request.count != "header":
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    return digest_of_ends(file, request.length)


def _probe_image(file: Any, digest: str) -> Probe:
    image = Image.open(cast(Any, file))
    codec = (image.format or "image").lower()
    if getattr(image, "n_frames", 1) > 1:
        raise BadClip(
            "unreadable", f"an animated {codec} is neither image nor video; convert it to mp4"
        )
    image.load()
    width, height = ImageOps.exif_transpose(image).size
    return Probe(codec, 1, 0.0, False, height, width, 0, 0.0, 0.0, digest)


def open_container(file: Any) -> av.container.InputContainer:
    """The container in an open file; its titles and tags may be in any encoding."""
    return av.open(cast(Any, file), mode="r", metadata_errors="replace")


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """The first video stream that is no cover image."""
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & av.stream.Disposition.attached_pic
    ]
    if not streams:
        raise BadClip("unreadable", "the file holds no video stream")
    stream = streams[0]
    # Frame threads can deadlock when decoding stops before the end.
    stream.thread_type = "SLICE"
    stream.codec_context.thread_count = 1
    return stream


def _probe_stream(file: Any, count: str, digest: str) -> Probe:
    with open_container(file) as container:
        stream = video_stream(container)
        first, times, last_duration = _frame_times(container, stream, count)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        codec = stream.codec.canonical_name
        aspect = stream.sample_aspect_ratio or 1
    times_s = np.sort(np.asarray(times, np.float64))
    start = float(times_s[0])
    fps, vfr = _frame_rate(times_s, rate)
    rotation = round(first.rotation / 90) * 90 % 360
    height, width = first.height, round(first.width * float(aspect))
    if rotation in (90, 270):
        height, width = width, height
    tail = last_duration or (1 / fps if fps else 0.0)
    duration = float(times_s[-1] - start) + tail
    return Probe(codec, len(times_s), fps, vfr, height, width, rotation, duration, start, digest)


def _frame_times(
    container: av.container.InputContainer, stream: av.VideoStream, count: str
) -> tuple[av.VideoFrame, list[float], float]:
    """The first frame, the times of all frames, and the duration of the last one (0: unknown)."""
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    promised = _promised_frames(container, stream, rate) if count == "header" else 0
    if promised:
        first = next(_decoded(container, stream), None)
        begin = first.time or 0.0 if first is not None else 0.0
        times, last_duration = [begin + index / rate for index in range(promised)], 0.0
    elif count in ("packets", "header"):
        # Packets that an edit list hides are decoded for others that depend on them, but not shown.
        packets = [
            packet for packet in container.demux(stream) if packet.size and not packet.is_discard
        ]
        times = [
            float(packet.pts * packet.time_base) if packet.pts is not None else index / rate
            for index, packet in enumerate(packets)
        ]
        container.seek(0)
        first = next(container.decode(stream), None)
        last_duration = 0.0
    else:
        first, times, last_duration = None, [], 0.0
        for index, frame in enumerate(_decoded(container, stream)):
            first = first or frame
            times.append(frame.time if frame.time is not None else index / rate)
            last_duration = _shown_for(frame)
    if first is None or not times:
        raise BadClip("unreadable", "no frame can be decoded")
    return first, times, last_duration


def _promised_frames(
    container: av.container.InputContainer, stream: av.VideoStream, rate: float
) -> int:
    """The frame count of the header, 0 where it has none."""
    by_duration = 0
    if stream.duration and stream.time_base:
        by_duration = round(float(stream.duration * stream.time_base) * rate)
    if stream.frames:
        # An edit list shortens the duration, not the number of stored frames.
        return min(stream.frames, by_duration or stream.frames)
    if by_duration:
        return by_duration
    # The duration of such containers counts from 0, not from their first frame.
    ends = (container.duration or 0) - max(0, container.start_time or 0)
    return max(0, round(ends / av.time_base * rate))


def _shown_for(frame: av.VideoFrame) -> float:
    """Seconds a frame is shown, 0 where the container does not say."""
    return float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[av.VideoFrame]:
    """Every frame in order. Raises BadClip with the number of frames decoded before the damage."""
    done = 0
    total = stream.frames or "unknown"
    try:
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise BadClip("unreadable", f"frame {done} of {total} is damaged")
            yield frame
            done += 1
    except av.error.FFmpegError as error:
        message = f"decoding fails after {done} of {total} frames: {in_words(error)}"
        raise BadClip("unreadable", message) from error


def _frame_rate(times_s: np.ndarray, nominal: float) -> tuple[float, bool]:
    """Frames a second, the container's own figure where the times agree with it; and whether the rate varies."""
    if len(times_s) < 2 or times_s[-1] <= times_s[0]:
        return nominal or 0.0, False
    intervals = np.diff(times_s)
    median = float(np.median(intervals))
    vfr = bool((np.abs(intervals - median) > VARIABLE_RATE * median + TIME_TOLERANCE).any())
    measured = (len(times_s) - 1) / float(times_s[-1] - times_s[0])
    is_nominal = not vfr and nominal > 0 and abs(measured / nominal - 1) < 0.01
    return (nominal if is_nominal else measured), vfr


def decode_frames(request: DecodeRequest) -> np.ndarray:
    """The frames shown at the requested times: uint8 (T, height, width, 3) RGB.

    A frame is shown from its own time until the next one's. Raises BadClip (`unreadable`,
    `too_few_frames`) and StorageFault.
    """
    file = ByteRange(request.path, request.offset, request.length, request.data)
    with file, blaming_the_clip(file):
        if request.kind == "image":
            image = ImageOps.exif_transpose(Image.open(cast(Any, file))).convert("RGB")
            return np.stack([fit_frame(np.asarray(image), request)] * len(request.times))
        return _decode_stream(file, request)


def _decode_stream(file: ByteRange, request: DecodeRequest) -> np.ndarray:
    with open_container(file) as container:
        stream = video_stream(container)
        if request.times[0] > SEEK_WORTH_SECONDS:
            tick = float(stream.time_base or 1)
            container.seek(
                int((request.times[0] + request.start) / tick), stream=stream, backward=True
            )
            clip = _pick(container, stream, request, sought=True)
            if clip is not None:
                return clip
            # A seek may overshoot where the container has no index; decoding from the start is always right.
            container.seek(0)
            stream.codec_context.flush_buffers()
        clip = _pick(container, stream, request, sought=False)
        assert clip is not None, "only a seek can overshoot"
        return clip


def _pick(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    request: DecodeRequest,
    *,
    sought: bool,
) -> np.ndarray | None:
    """The requested frames, decoded from the current position; None where a seek overshot the first of them."""
    clip = np.empty((len(request.times), request.height, request.width, 3), np.uint8)
    rate = request.fps or 25.0
    filled = 0
    shown: av.VideoFrame | None = None
    for index, frame in enumerate(_decoded(container, stream)):
        if frame.time is None and sought:
            return None
        time = (frame.time if frame.time is not None else index / rate) - request.start
        if shown is None and sought and time > request.times[0] + TIME_TOLERANCE:
            return None
        end = filled
        while end < len(request.times) and request.times[end] + TIME_TOLERANCE < time:
            end += 1
        if end > filled:
            clip[filled:end] = _fit(shown or frame, request)
            filled = end
            if filled == len(request.times):
                return clip
        shown, shown_at = frame, time
    if shown is None:
        if sought:
            return None
        raise BadClip("unreadable", "no frame can be decoded")
    lasts = _shown_for(shown) or 1 / rate
    if request.times[-1] >= shown_at + lasts + TIME_TOLERANCE:
        raise too_few_frames(shown_at, request)
    clip[filled:] = _fit(shown, request)
    return clip


def too_few_frames(last: float, request: DecodeRequest) -> BadClip:
    """The error of a clip whose last frame, at `last` seconds, comes before the last requested time."""
    return BadClip(
        "too_few_frames",
        f"the last frame is at {last:.3f} s, but {request.times[-1]:.3f} s was planned; "
        "the file changed since it was indexed",
    )


def _fit(frame: av.VideoFrame, request: DecodeRequest) -> np.ndarray:
    rgb = frame.to_ndarray(format="rgb24", threads=1)
    return fit_frame(np.rot90(rgb, request.rotation // 90), request)


def batches_of_frames(request: DecodeRequest) -> Iterator[slice]:
    """The parts of a clip whose frames are held in memory together at their full size."""
    size = max(1, BATCH_BYTES // max(1, 3 * request.shown[0] * request.shown[1]))
    for start in range(0, len(request.times), size):
        yield slice(start, min(start + size, len(request.times)))


def fit_frame(rgb: np.ndarray, request: DecodeRequest) -> np.ndarray:
    """Crop and resize one displayed frame (H, W, 3), anti-aliased; every decoder uses this function."""
    height, width = rgb.shape[:2]
    scale_y, scale_x = height / request.shown[0], width / request.shown[1]
    top, left, crop_height, crop_width = request.crop
    box = (
        left * scale_x,
        top * scale_y,
        min(width, (left + crop_width) * scale_x),
        min(height, (top + crop_height) * scale_y),
    )
    if box == (0, 0, width, height) and (height, width) == (request.height, request.width):
        return rgb
    image = Image.fromarray(np.ascontiguousarray(rgb))
    size = (request.width, request.height)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))
