"""What the manifest says of a clip: its frames, rate and size, and what about it needs care when it is read.

Runs in child processes that can be killed, so nothing here may import torch.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from sora_train.data.decode import hdr, picture, rgb
from sora_train.data.decode.frames import (
    COUNTED,
    HIDDEN,
    INTERLACED,
    TIME_TOLERANCE,
    BadClip,
    blaming_the_clip,
    decoded,
    open_container,
    shown_for,
    video_stream,
)
from sora_train.data.storage.ranges import ByteRange, digest_of_ends

if TYPE_CHECKING:
    from sora_train.data.manifest import Manifest

GAPS, PQ, HLG, ALPHA = "gaps", "pq", "hlg", "alpha"
TRAITS = {
    ALPHA: "transparent: laid over data.alpha_background{background}",
    PQ: "in HDR (PQ): tone-mapped to SDR (data.hdr)",
    HLG: "in HDR (HLG): tone-mapped to SDR (data.hdr)",
    "untagged_hd": "larger than SD without a colour matrix: read as BT.709",
    INTERLACED: "interlaced: frames made whole (bwdif)",
    "mirrored": "mirrored by the display matrix: shown so",
    COUNTED: "with times that fall, jump or are missing: frames are counted at the container's rate",
    GAPS: "of an even rate with gaps: read at that rate",
    HIDDEN: "with frames that an edit list hides: left out",
    "several_sizes": "whose frames change their size: each is brought to the bucket's",
    "several_streams": "with several video streams: the first that is no cover is read",
    "non_square": "with pixels that are not square: shown at their proper width",
    "other_container": "in another container than MP4 or Matroska: read by PyAV",
    "no_duration": "whose header says no duration: read by PyAV",
    "first_of_several": "with several pictures in the file: the first is read",
}
"""What needs care in a file, and what is done, in the order of the manifest's column `traits`. Such a
clip is read by PyAV whatever `data.decoder` is, as other decoders give other pixels or times."""

# The classes of a clip's size, by its most pixels, and of how far its keyframes are apart, by their most frames.
_SIZES = {"sd": 720 * 576, "hd": 1920 * 1088}
_KEYS = {"keys_unknown": 0.5, "keys_all": 1.5, "keys_near": 32.0}
# Containers that every decoder reads right.
_OFFERED = frozenset({"mp4", "matroska"})
# Frame intervals that differ from the median by more than this share of it make a rate variable.
VARIABLE_RATE = 0.2
# An even rate is one of which no more than this share of the intervals differ.
_FEW = 0.1
# Frames that a cut leaves behind without the ones they were to be shown among: a GOP's hierarchy.
_STRAY_FRAMES = 8
# What FFmpeg takes for a discontinuity (-dts_delta_threshold).
_JUMP_SECONDS = 10.0
# More than any codec reorders.
_LOOKED_AT = 32


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
    """The manifest's figures of a clip: height and width as displayed, `start` the first frame's own time.

    `traits` are words of TRAITS with spaces between.
    """

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
    traits: str = ""
    coding: str = ""
    """What its pixels and the time of its decoding depend on besides the codec; '' for an image. See `_coding`."""


@dataclass(frozen=True)
class Timing:
    """When the frames of a clip are shown; seconds, frames a second."""

    frames: int
    fps: float
    vfr: bool
    start: float
    duration: float
    trait: str = ""


def traits_told(manifest: Manifest, background: str = "", decoder: str = "pyav") -> list[str]:
    """A line for each trait: how many usable clips have it, and what is done.

    `background` is `data.alpha_background`, `decoder` the one that the run names, where they are known.
    """
    counted = manifest.traits_counted()
    value = f"={background}" if background else ""
    lines = [
        f"{counted[trait]} {what.format(background=value)}"
        for trait, what in TRAITS.items()
        if trait in counted
    ]
    if lines and decoder != "pyav":
        number = int(((manifest.traits != "") & (manifest.drop_reason == "")).sum())
        lines.append(
            f"{number} of these clips are read by PyAV, as {decoder} would show them otherwise"
        )
    return lines


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
    image = picture.open_picture(file)
    codec = (image.format or "image").lower()
    traits = {"first_of_several"} if picture.has_others(image) else set()
    image.load()
    if picture.is_transparent(image):
        traits.add(ALPHA)
    picture.turn_upright(image)
    width, height = image.size
    return Probe(codec, 1, 0.0, False, height, width, 0, 0.0, 0.0, digest, _listed(traits))


def _listed(traits: set[str]) -> str:
    return " ".join(trait for trait in TRAITS if trait in traits)


def _probe_stream(file: Any, count: str, digest: str) -> Probe:
    traits: set[str] = set()
    with open_container(file) as container:
        stream = video_stream(container)
        if count == "decode":
            first, times, last_duration, keys = _decoded_times(container, stream, traits)
        else:
            first = _look_at_the_start(container, stream, traits)
            begin = first.time or 0.0
            times = _promised_times(container, stream, begin) if count == "header" else []
            packets, keys = ([], 0) if times else _packet_times(file)
            times, last_duration = times or packets, 0.0
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        codec = stream.codec.canonical_name
        aspect = stream.sample_aspect_ratio or 1
        if len(container.streams.video) > 1:
            traits.add("several_streams")
        if not _OFFERED & set(container.format.name.split(",")):
            traits.add("other_container")
        if not container.duration:
            traits.add("no_duration")
    if aspect != 1:
        traits.add("non_square")
    if COUNTED in traits:
        times = [None] * len(times)
    timing = timing_of(times, rate, last_duration)
    traits.add(timing.trait)
    height, width = first.height, round(first.width * float(aspect))
    if rgb.is_turned(first):
        height, width = width, height
    rotation = round(first.rotation / 90) * 90 % 360
    return Probe(
        codec,
        timing.frames,
        timing.fps,
        timing.vfr,
        height,
        width,
        rotation,
        timing.duration,
        timing.start,
        digest,
        _listed(traits),
        _coding(first, len(times) / keys if keys else 0.0),
    )


def _coding(first: av.VideoFrame, key_distance: float) -> str:
    """Words for a clip's pixel format, colour matrix and range (numbers of H.273), size, and distance of keyframes."""
    pixels = first.width * first.height
    size = next((name for name, most in _SIZES.items() if pixels <= most), "uhd")
    keys = next((name for name, most in _KEYS.items() if key_distance <= most), "keys_far")
    return f"{first.format.name} matrix{int(first.colorspace)} range{int(first.color_range)} {size} {keys}"


def _decoded_times(
    container: av.container.InputContainer, stream: av.VideoStream, traits: set[str]
) -> tuple[av.VideoFrame, list[float | None], float, int]:
    """The first frame, the times of all frames (None: unknown), the duration of the last one (0: unknown), how many
    are keyframes.

    What the frames need is added to `traits`.
    """
    times: list[float | None] = []
    first, size, last_duration, keys = None, None, 0.0, 0
    for frame in decoded(container, stream, traits):
        first = first or frame
        traits |= _traits_of(frame)
        if size not in (None, (frame.width, frame.height)):
            traits.add("several_sizes")
        size = frame.width, frame.height
        times.append(frame.time)
        keys += frame.key_frame
        last_duration = shown_for(frame)
    if first is None:
        raise BadClip("unreadable", "no frame can be decoded")
    return first, times, last_duration, keys


def _promised_times(
    container: av.container.InputContainer, stream: av.VideoStream, begin: float
) -> list[float | None]:
    """The times of the frames that the header promises, none where it does not."""
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    promised = _promised_frames(container, stream, rate)
    return [begin + index / rate for index in range(promised)]


def _packet_times(file: Any) -> tuple[list[float | None], int]:
    """The times that the packets bear, those without one at the end; and how many are keyframes."""
    # Opened anew, as a stream without an index cannot go back to its start.
    file.seek(0)
    with open_container(file) as container:
        # Packets that an edit list hides are decoded for others that depend on them, but not shown.
        packets = [
            packet
            for packet in container.demux(video_stream(container))
            if packet.size and not packet.is_discard
        ]
    known = [packet for packet in packets if packet.pts is not None]
    if not packets:
        raise BadClip("unreadable", "no frame can be decoded")
    times = sorted(float((packet.pts or 0) * packet.time_base) for packet in known)
    keys = sum(packet.is_keyframe for packet in packets)
    return [*times, *[None] * (len(packets) - len(known))], keys


def _look_at_the_start(
    container: av.container.InputContainer, stream: av.VideoStream, traits: set[str]
) -> av.VideoFrame:
    """The first frame; its traits, and whether times fall, are added to `traits`."""
    frames = decoded(container, stream, traits)
    first = next(frames, None)
    if first is None:
        raise BadClip("unreadable", "no frame can be decoded")
    traits |= _traits_of(first)
    # AVI holds the order of decoding, of which libav makes times that look right before decoding.
    if first.time is None or container.format.name == "avi":
        times: list[float | None] = [
            first.time,
            *(frame.time for frame in itertools.islice(frames, _LOOKED_AT)),
        ]
        traits |= {timing_of(times, 0.0, 0.0).trait} & {COUNTED}
    return first


def _traits_of(frame: av.VideoFrame) -> set[str]:
    """What a frame shows of itself."""
    return {
        trait
        for trait, holds in (
            (ALPHA, rgb.has_alpha(frame)),
            (PQ, frame.color_trc == hdr.PQ),
            (HLG, frame.color_trc == hdr.HLG),
            ("untagged_hd", rgb.is_untagged_hd(frame)),
            (INTERLACED, frame.interlaced_frame),
            ("mirrored", rgb.is_mirrored(frame)),
        )
        if holds
    }


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


def timing_of(times: list[float | None], nominal: float, last_duration: float) -> Timing:
    """When frames are shown, of which the container says these times, in the order of their showing.

    `nominal` is the container's frame rate (0: unknown), `last_duration` the seconds of the last frame
    (0: unknown). Times that fall, jump or are missing are left aside for the rate.
    """
    known = np.array([time for time in times if time is not None], np.float64)
    if len(times) == 1:
        start = float(known[0]) if len(known) else 0.0
        return Timing(1, nominal, False, start, last_duration or (1 / nominal if nominal else 0.0))
    steps = np.diff(known)
    median = float(np.median(steps)) if len(steps) else 0.0
    is_missing = len(known) < len(times)
    if is_missing or (steps < 0).any() or (steps == 0).mean() > _FEW or _jumps(steps, median):
        fps = _even_rate(known, nominal)
        return Timing(len(times), fps, False, 0.0, len(times) / fps, COUNTED)
    differs = np.abs(steps - median) > VARIABLE_RATE * median + TIME_TOLERANCE
    body = len(steps) - min(_STRAY_FRAMES, len(steps) // 2)
    is_even = differs[:body].mean() <= _FEW and abs(nominal * median - 1) <= VARIABLE_RATE / 4
    start = float(known[0])
    if differs.any() and is_even:
        if differs[body:].any():
            end = body + int(differs[body:].argmax())
            known, differs = known[: end + 1], differs[:end]
        span = float(known[-1]) - start
        duration = span + 1 / nominal
        return Timing(
            round(span * nominal) + 1, nominal, bool(differs.any()), start, duration, GAPS
        )
    span = float(known[-1]) - start
    measured = (len(known) - 1) / span if span > 0 else nominal
    # A rate that is a little off (30 for 29.97) would show frames twice, more of them the longer the clip.
    is_nominal = (
        not differs.any()
        and nominal > 0
        and abs(span - (len(known) - 1) / nominal) <= 2 * TIME_TOLERANCE
    )
    fps = nominal if is_nominal else measured
    tail = last_duration or (1 / fps if fps else 0.0)
    return Timing(len(known), fps, bool(differs.any()), start, span + tail)


def _jumps(steps: np.ndarray, median: float) -> bool:
    """Whether an interval is no hold of a frame but another clock."""
    return bool((steps > max(_JUMP_SECONDS, _JUMP_SECONDS * median)).any())


def _even_rate(known: np.ndarray, nominal: float) -> float:
    """The container's rate where the times that are there can be of it, else theirs; else 25."""
    steps = np.diff(np.unique(known))
    median = float(np.median(steps)) if len(steps) else 0.0
    if nominal > 0 and (not median or abs(nominal * median - 1) <= VARIABLE_RATE):
        return nominal
    return 1 / median if median else nominal or 25.0
