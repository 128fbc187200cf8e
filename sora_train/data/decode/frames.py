"""Decodes a clip's frames at a bucket's size. Pure functions.

They run in child processes that can be killed, so nothing here may import torch or keep state.
Frames are chosen by presentation time, because containers give wrong counts and rates; they are counted
only where the probe found that the times themselves are wrong. Times are seconds after the clip's first frame.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from sora_train.data.decode import picture, rgb
from sora_train.data.decode.packets import PacketChoice, Unordered
from sora_train.data.storage.ranges import ByteRange, StorageFault

if TYPE_CHECKING:
    from sora_train.data.manifest import Stamp
    from sora_train.data.storage.retry import ReadPolicy

av.logging.set_level(av.logging.PANIC)

# Matroska rounds times to a millisecond, so a frame may begin up to half of one late.
TIME_TOLERANCE = 1e-3
# GIF rounds times to these seconds. What is coarser (AVI's frame) is exact.
COARSE_TICK = 0.01
# A seek costs about as much as decoding a second of video from the start.
SEEK_WORTH_SECONDS = 1.0
# MPEG program streams: their frames have other times after a seek.
UNSEEKABLE = ("mpeg",)
# FFmpeg's names of the forms of files that hold their own frames.
CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,vvc,av1,obu,ivf,flv,live_flv,asf,gif,ogg,mxf,dv,rm,"
    "yuv4mpegpipe,nut,h263,vc1,apng,webp,png_pipe,jpeg_pipe,mjpeg,webp_pipe,bmp_pipe,tiff_pipe"
)
# The largest batch of decoders that return whole batches: a minute of 1080p would be 6 GB.
BATCH_BYTES = 1 << 28
# A clip of no more bytes, and of eight times as many of pixels, is decoded in some milliseconds.
LIGHT_BYTES = 1 << 16
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES})
"""Errors of what is written while a clip is read, which no clip can cause."""
COUNTED, INTERLACED, HIDDEN = "counted", "interlaced", "hidden_frames"
"""What a probe says of a clip that matters to its decoding; see `sora_train.data.decode.probe.TRAITS`."""
# libav's own decoders of these leave the alpha aside, which WebM keeps beside the picture.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Their decoders look at each packet anew for what to leave out; dav1d looks once, at the first.
_DROPPING = frozenset({"h264", "hevc"})
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
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise StorageFault(f"{error.strerror}: {error.filename}") from error
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
    start: float = 0.0
    fps: float = 0.0
    traits: str = ""
    """What the probe said of the clip, words with spaces between."""
    alpha_background: str = "black"
    """The colour that is laid under transparency."""
    backend: str = "pyav"
    reading: ReadPolicy | None = None
    """The retries and cache for a `path` that is an address; None where it is a local file."""
    digest: str = ""
    """The digest of the bytes as indexed, which remote bytes must have."""
    data: bytes | None = None
    """The bytes, where they are in memory already."""
    stamp: Stamp | None = None
    """Size and fingerprint of a remote shard, so that a cache can keep it block by block."""

    @property
    def is_light(self) -> bool:
        """Whether it takes so few milliseconds that handing it over alone would cost a good part of them."""
        pixels = 3 * len(self.times) * self.height * self.width
        return self.reading is None and max(self.length, pixels // 8) <= LIGHT_BYTES


@dataclass(frozen=True)
class TimedRequest(DecodeRequest):
    """Asks for (seconds of the process's cores, frames), so that other work on the machine does not count."""


def open_container(file: Any) -> av.container.InputContainer:
    """The container in an open file; its titles and tags may be in any encoding.

    Playlists and lists of files are no containers: FFmpeg would open the files and addresses that they name. Raises
    BadClip for these.
    """
    options = {"format_whitelist": CONTAINERS}
    try:
        return av.open(cast(Any, file), mode="r", metadata_errors="replace", options=options)
    except av.error.ArgumentError as error:
        raise BadClip("unreadable", "the file is no container of video") from error


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
    if stream.codec_context is None:
        raise BadClip("unreadable", "FFmpeg does not know the codec of its video stream")
    # Frame threads can deadlock when decoding stops before the end.
    stream.thread_type = "SLICE"
    stream.codec_context.thread_count = 1
    return stream


def shown_for(frame: av.VideoFrame) -> float:
    """Seconds a frame is shown, 0 where the container does not say."""
    return float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0


def decoded(
    container: av.container.InputContainer, stream: av.VideoStream, traits: set[str] | None = None
) -> Iterator[av.VideoFrame]:
    """Every frame in order; adds to `traits` where an edit list hides frames.

    Raises BadClip with the number of frames decoded before the damage.
    """
    done = 0
    total = stream.frames or "unknown"
    decode = _decoder(stream)
    try:
        for packet in container.demux(stream):
            if traits is not None and packet.is_discard:
                traits.add(HIDDEN)
            for frame in decode(packet):
                if frame.is_corrupt:
                    raise BadClip("unreadable", f"frame {done} of {total} is damaged")
                yield frame
                done += 1
    except av.error.FFmpegError as error:
        message = f"decoding fails after {done} of {total} frames: {in_words(error)}"
        raise BadClip("unreadable", message) from error


def _decoder(stream: av.VideoStream) -> Callable[[av.Packet], list[av.VideoFrame]]:
    """What turns packets into frames, their alpha included. Raises BadClip where FFmpeg lacks the decoder for it."""
    name = _alpha_decoder(stream)
    if not name:
        return stream.codec_context.decode
    if name not in av.codecs_available:
        raise BadClip("unreadable", f"its alpha needs {name}, which this FFmpeg was built without")
    context = cast(av.VideoCodecContext, av.CodecContext.create(name, "r"))
    context.thread_count = 1
    return lambda packet: context.decode(packet if packet.size else None)


def _alpha_decoder(stream: av.VideoStream) -> str:
    """The decoder that a stream's alpha needs, '' where the usual one will do."""
    name = _ALPHA_DECODERS.get(stream.codec.canonical_name, "")
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    return name if tags.get("alpha_mode") == "1" else ""


def progressive(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """The frames, those marked as interlaced made whole by FFmpeg's bwdif: as many, at the same times."""
    graph, before = None, None
    for frame in frames:
        form = (frame.width, frame.height, frame.format.name)
        if graph is not None and form != before:
            yield from _pulled(graph, None)
            graph = None
        if graph is None and frame.interlaced_frame:
            graph, before = _bwdif(frame), form
        if graph is None:
            yield frame
        else:
            yield from _pulled(graph, frame)
    if graph is not None:
        yield from _pulled(graph, None)


def _bwdif(frame: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        time_base=frame.time_base,
    )
    source.link_to(filtered := graph.add("bwdif", "mode=send_frame:deint=interlaced"))
    filtered.link_to(graph.add("buffersink"))
    graph.configure()
    return graph


def _pulled(graph: av.filter.Graph, frame: av.VideoFrame | None) -> Iterator[av.VideoFrame]:
    """Push a frame (None: the end), and yield what comes out."""
    graph.vpush(frame)
    while True:
        try:
            pulled = graph.vpull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        yield pulled


def decode_frames(request: DecodeRequest) -> np.ndarray:
    """The frames shown at the requested times: uint8 (T, height, width, 3) RGB.

    A frame is shown from its own time until the next one's. Raises BadClip (`unreadable`,
    `too_few_frames`) and StorageFault.
    """
    file = ByteRange(request.path, request.offset, request.length, request.data)
    with file, blaming_the_clip(file):
        if request.kind == "image":
            image = picture.as_rgb(picture.open_picture(file), request.alpha_background)
            return np.stack([_fit_image(image, request)] * len(request.times))
        return decode_stream(file, request)


def decode_stream(file: Any, request: DecodeRequest) -> np.ndarray:
    """`decode_frames` of a video in an open file. Raises BadClip and libav's errors."""
    with open_container(file) as container:
        stream = video_stream(container)
        traits = request.traits.split()
        is_sought = COUNTED not in traits and container.format.name not in UNSEEKABLE
        begin = request.times[0] + request.start
        if INTERLACED in traits:
            # A frame is made whole from those around it, and a seek must not change its pixels.
            begin -= 2 / (request.fps or 25.0)
        # What a frame is made of besides its own packet must not be left out.
        is_chosen = is_sought and INTERLACED not in traits and not _alpha_decoder(stream)
        if request.times[0] > SEEK_WORTH_SECONDS and is_sought:
            tick = float(stream.time_base or 1)
            container.seek(int(begin / tick), stream=stream, backward=True)
        elif not is_chosen:
            is_sought = False
        if is_sought:
            choice = _choice(container, stream, request) if is_chosen else None
            clip = _pick(container, stream, request, choice, sought=True)
            if clip is not None:
                return clip
            # A seek may overshoot where the container has no index; decoding from the start is always right.
            container.seek(0)
            stream.codec_context.flush_buffers()
        clip = _pick(container, stream, request, None, sought=False)
        assert clip is not None, "only what was left out can be missing"
        return clip


def _choice(
    container: av.container.InputContainer, stream: av.VideoStream, request: DecodeRequest
) -> PacketChoice:
    """The packets that show the requested frames, from the current position on."""
    tolerance = _tolerance(stream)
    base = stream.time_base or Fraction(1)
    return PacketChoice(
        container.demux(stream),
        [time + tolerance for time in request.times],
        # In the order in which libav's binding works out the time of a frame, to the last digit.
        lambda ticks: float(ticks) * base.numerator / base.denominator - request.start,
    )


def _decoded_choice(stream: av.VideoStream, choice: PacketChoice) -> Iterator[av.VideoFrame]:
    """The frames of chosen packets; the decoder leaves out what it can of those that are not shown.

    Raises Unordered where one of them is damaged, so that all are decoded and it is said which.
    """
    context = stream.codec_context
    may_drop = stream.codec.canonical_name in _DROPPING
    # Asks for the frames that the decoder still holds, which take their clock from it.
    end = av.Packet(0)
    end.time_base = stream.time_base or Fraction(1)
    try:
        for step in choice.steps():
            if step.jumps:
                yield from context.decode(end)
                context.flush_buffers()
            if may_drop:
                context.skip_frame = "NONREF" if step.droppable else "DEFAULT"
            for frame in context.decode(cast(av.Packet, step.packet)):
                if frame.is_corrupt and frame.pts in choice.shown:
                    raise Unordered("a frame is damaged")
                yield frame
        yield from context.decode(end)
    except av.error.FFmpegError as error:
        raise Unordered("decoding fails") from error
    finally:
        context.skip_frame = "DEFAULT"


def _tolerance(stream: av.VideoStream) -> float:
    tick = float(stream.time_base or 0)
    return max(TIME_TOLERANCE, tick / 2 if tick <= COARSE_TICK else 0)


def _pick(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    request: DecodeRequest,
    choice: PacketChoice | None,
    *,
    sought: bool,
) -> np.ndarray | None:
    """The requested frames, decoded from the current position, all or those of the chosen packets.

    None where a seek overshot the first of them, or the choice missed one.
    """
    if choice is None:
        frames = progressive(decoded(container, stream))
        return _filled(frames, stream, request, None, sought=sought)
    try:
        return _filled(_decoded_choice(stream, choice), stream, request, choice, sought=True)
    except Unordered:
        return None


def _filled(
    frames: Iterator[av.VideoFrame],
    stream: av.VideoStream,
    request: DecodeRequest,
    choice: PacketChoice | None,
    *,
    sought: bool,
) -> np.ndarray | None:
    clip = np.empty((len(request.times), request.height, request.width, 3), np.uint8)
    rate = request.fps or 25.0
    counted = COUNTED in request.traits.split()
    tolerance = _tolerance(stream)
    filled = 0
    shown: av.VideoFrame | None = None
    for index, frame in enumerate(frames):
        if sought and (frame.time is None or (choice and frame.interlaced_frame)):
            return None
        by_clock = frame.time is not None and not counted
        time = (frame.time if by_clock else index / rate) - request.start
        if shown is None and sought and time > request.times[0] + tolerance:
            return None
        end = filled
        while end < len(request.times) and request.times[end] + tolerance < time:
            end += 1
        if end > filled:
            if choice and not _are_shown(shown, choice.shown[filled:end]):
                return None
            clip[filled:end] = _fit(shown or frame, request)
            filled = end
            if filled == len(request.times):
                return clip
        shown, shown_at = frame, time
    if shown is None:
        if sought:
            return None
        raise BadClip("unreadable", "no frame can be decoded")
    if choice and not _are_shown(shown, choice.shown[filled:]):
        return None
    lasts = shown_for(shown) or 1 / rate
    is_last = choice is None or not choice.holds_more
    if is_last and request.times[-1] >= shown_at + lasts + tolerance:
        raise too_few_frames(shown_at, request)
    clip[filled:] = _fit(shown, request)
    return clip


def _are_shown(frame: av.VideoFrame | None, ticks: Sequence[int]) -> bool:
    """Whether a frame is the one that was chosen at each of some times."""
    return frame is not None and all(frame.pts == chosen for chosen in ticks)


def too_few_frames(last: float, request: DecodeRequest) -> BadClip:
    """The error of a clip whose last frame, at `last` seconds, comes before the last requested time."""
    return BadClip(
        "too_few_frames",
        f"the last frame is at {last:.3f} s, but {request.times[-1]:.3f} s was planned; "
        "the file changed since it was indexed",
    )


def _fit(frame: av.VideoFrame, request: DecodeRequest) -> np.ndarray:
    # No smaller than twice the size that is asked for, so that resizing has enough to go by.
    _, _, height, width = request.crop
    reduced = max(1, int(min(height / request.height, width / request.width) / 2))
    return fit_frame(rgb.shown(frame, request.alpha_background, reduced), request)


def batches_of_frames(request: DecodeRequest) -> Iterator[slice]:
    """The parts of a clip whose frames are held in memory together at their full size."""
    size = max(1, BATCH_BYTES // max(1, 3 * request.shown[0] * request.shown[1]))
    for start in range(0, len(request.times), size):
        yield slice(start, min(start + size, len(request.times)))


def fit_frame(frame: np.ndarray, request: DecodeRequest) -> np.ndarray:
    """Crop and resize one displayed frame (H, W, 3), anti-aliased; every decoder uses this function."""
    box, size = _box(frame.shape[1], frame.shape[0], request), (request.width, request.height)
    if box == (0, 0, *size) and frame.shape[1::-1] == size:
        return frame
    return _fit_image(Image.fromarray(np.ascontiguousarray(frame)), request)


def _fit_image(image: Image.Image, request: DecodeRequest) -> np.ndarray:
    """`fit_frame` of an image in RGB, of which a copy as an array would take as much memory again."""
    box, size = _box(*image.size, request), (request.width, request.height)
    if box == (0, 0, *size) and image.size == size:
        return np.asarray(image)
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))


def _box(width: int, height: int, request: DecodeRequest) -> tuple[float, float, float, float]:
    """The request's crop in a frame of this size: left, top, right, bottom."""
    scale_y, scale_x = height / request.shown[0], width / request.shown[1]
    top, left, crop_height, crop_width = request.crop
    return (
        left * scale_x,
        top * scale_y,
        min(width, (left + crop_width) * scale_x),
        min(height, (top + crop_height) * scale_y),
    )
