"""Files that a policy looks at: what they are by their bytes, within limits that are checked before decoding.

Only one frame at a time is held.
"""

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from sora_train.data.decode import picture
from sora_train.data.decode.frames import BadClip, decoded, in_words, open_container, video_stream
from sora_train.data.decode.rgb import shown
from sora_train.errors import UserError
from sora_train.serving.safety.policy_file import UploadLimits

HEAD = 16
_IMAGES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
_VIDEOS = {b"\x1a\x45\xdf\xa3": "webm"}
_BRANDS = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
"""Boxes that an MP4 or QuickTime file begins with."""
_BACKGROUND = "black"


class BadFile(UserError):
    """A file that is no picture or clip, is damaged, or is over a limit; the message is for whoever sent it."""


def kind_of(head: bytes) -> tuple[str, str]:
    """("image", "png") and the like, by the first HEAD bytes of a file; ("", "") of any other."""
    for magic, form in _IMAGES.items():
        if head.startswith(magic):
            return "image", form
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image", "webp"
    if head[4:8] in _BRANDS and head[8:11] != b"avi" and head[8:11] != b"hei":
        return "video", "mp4"
    for magic, form in _VIDEOS.items():
        if head.startswith(magic):
            return "video", form
    return "", ""


def read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def require_kind(path: Path, kind: str, limits: UploadLimits) -> str:
    """The form of an uploaded file of the `kind` "image" or "video". Raises BadFile."""
    size = path.stat().st_size
    most = limits.image_bytes if kind == "image" else limits.video_bytes
    if size > most:
        raise BadFile(f"the {kind} has {size} bytes; at most {most} are taken")
    found, form = kind_of(read_head(path))
    if found != kind:
        wanted = (
            "a PNG, JPEG or WebP picture" if kind == "image" else "an MP4, QuickTime or WebM clip"
        )
        is_what = f"a {form} {found}" if found else "none that is known"
        raise BadFile(f"the file is {is_what} by its bytes; send {wanted}")
    return form


def picture_of(path: Path, limits: UploadLimits) -> np.ndarray:
    """The picture in a file, uint8 (H, W, 3) RGB, decoded to its end. Raises BadFile."""
    form = require_kind(path, "image", limits)
    try:
        # Pillow reads many more forms than these, of which several have had their faults.
        with Image.open(path, formats=(form.upper(),)) as image:
            pixels = image.width * image.height
            if pixels > limits.image_pixels:
                raise BadFile(
                    f"the picture has {image.width}x{image.height} pixels; at most {limits.image_pixels} are taken"
                )
            if picture.has_others(image):
                raise BadFile("the picture is animated; send a still one, or a clip")
            return np.asarray(picture.as_rgb(image, _BACKGROUND))
    except BadFile:
        raise
    except Exception as error:
        raise BadFile(f"the picture cannot be read: {in_words(error)}; save it anew") from error


def frames_of(
    path: Path, fps: float, limits: UploadLimits | None = None
) -> Generator[np.ndarray, None, None]:
    """Pictures of a clip, `fps` in a second and its last frame, uint8 (H, W, 3) RGB; all frames are decoded.

    Raises BadFile where it is damaged or, with `limits`, over one of them.
    """
    if limits is not None:
        require_kind(path, "video", limits)
    try:
        with path.open("rb") as file, open_container(file) as container:
            yield from _frames(container, fps, limits)
    except BadFile:
        raise
    except BadClip as error:
        raise BadFile(f"the clip cannot be read: {error.detail}; encode it anew") from error
    except (av.error.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        raise BadFile(f"the clip cannot be read: {in_words(error)}; encode it anew") from error


def _frames(
    container: av.container.InputContainer, fps: float, limits: UploadLimits | None
) -> Generator[np.ndarray, None, None]:
    stream = video_stream(container)
    began, due, number, last = time.monotonic(), 0.0, 0, None
    rate = float(stream.average_rate or 25)
    first: float | None = None
    if limits is not None:
        _within(stream.codec_context, limits)
        # Frames may grow later on: the decoder refuses them before it takes the memory. Codecs pad them a little.
        stream.codec_context.options = {"max_pixels": str(2 * limits.video_pixels)}
    for number, frame in enumerate(decoded(container, stream)):
        when = frame.time if frame.time is not None else number / rate
        first = when if first is None else first
        at = when - first
        if limits is not None:
            _within(frame, limits)
            _not_too_long(at, number, time.monotonic() - began, limits)
        last = frame
        if at >= due - 0.5 / rate:
            yield shown(frame, _BACKGROUND)
            due, last = max(due + 1 / fps, at + 0.5 / fps), None
    if last is not None:
        yield shown(last, _BACKGROUND)
    if first is None:
        raise BadFile("the clip holds no frame; encode it anew")


def _within(sized: Any, limits: UploadLimits) -> None:
    if sized.width * sized.height > limits.video_pixels:
        raise BadFile(
            f"the clip has frames of {sized.width}x{sized.height} pixels; at most {limits.video_pixels} are taken"
        )


def _not_too_long(at: float, number: int, worked: float, limits: UploadLimits) -> None:
    if at > limits.video_seconds:
        raise BadFile(f"the clip is longer than {limits.video_seconds:g} s; cut it")
    if number >= limits.video_frames:
        raise BadFile(f"the clip has more than {limits.video_frames} frames; cut it")
    if worked > limits.work_seconds:
        raise BadFile(
            f"the clip takes more than {limits.work_seconds:g} s to look at; cut it, or scale it down"
        )
