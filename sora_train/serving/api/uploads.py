"""Files that requests bring: known by their content, whole, of a sane size; only then are they kept.

What a client says of a file (its name, its kind) is not believed: OpenAI's sends `bytes` as application/octet-stream.
"""

import contextlib
import hashlib
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import av
from PIL import Image

from sora_train.serving.errors import BadRequest
from sora_train.serving.jobs.job import Upload

MOST_PIXELS = 64_000_000
MOST_SECONDS = 600.0
LEFT_SECONDS = 6 * 3600.0
"""No request takes so long."""
_IMAGES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif"}
_MATROSKA = b"\x1aE\xdf\xa3"


@dataclass(frozen=True)
class Arrived:
    """An upload in the folder of what arrived."""

    path: Path
    kind: str
    """image or video."""
    ending: str
    digest: str
    size: tuple[int, int]
    """Width, height."""
    seconds: float = 0.0
    client_name: str = ""

    def upload(self, job_id: str, number: int) -> Upload:
        """What the job keeps of it."""
        return Upload(f"inputs/{job_id}/{number}.{self.ending}", self.kind, self.digest)


class Arrivals:
    """A folder where uploads lie while they are looked at; several gateways may share it."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for place in folder.iterdir():
            # Of a gateway that was killed; what is younger may be another's request.
            with contextlib.suppress(FileNotFoundError):
                if time.time() - place.stat().st_mtime > LEFT_SECONDS:
                    shutil.rmtree(place, ignore_errors=True)

    @contextlib.contextmanager
    def visit(self) -> Iterator["Visit"]:
        """A request's files, gone at its end."""
        place = self.folder / uuid.uuid4().hex
        place.mkdir()
        try:
            yield Visit(place)
        finally:
            shutil.rmtree(place, ignore_errors=True)


class Visit:
    """The files of one request."""

    def __init__(self, folder: Path):
        self.folder, self._count = folder, 0

    def take(self, source: BinaryIO, param: str, client_name: str = "") -> Arrived:
        """Look at a file. Raises BadRequest for what is no whole image or video."""
        self._count += 1
        path, digest = self.folder / str(self._count), hashlib.sha256()
        source.seek(0)
        with path.open("wb") as file:
            while piece := source.read(1 << 20):
                digest.update(piece)
                file.write(piece)
        kind, ending = sniffed(path, param)
        look = _image if kind == "image" else _video
        size, seconds = look(path, param)
        return Arrived(path, kind, ending, digest.hexdigest(), size, seconds, client_name[:200])


def sniffed(path: Path, param: str) -> tuple[str, str]:
    """(image or video, how its name ends) by a file's first bytes. Raises BadRequest for any other."""
    with path.open("rb") as file:
        head = file.read(16)
    for magic, ending in _IMAGES.items():
        if head.startswith(magic):
            return "image", ending
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image", "webp"
    if head[4:8] == b"ftyp":
        return "video", "mp4"
    if head.startswith(_MATROSKA):
        return "video", "webm"
    found = "an empty file" if not head else "a file of another kind"
    raise BadRequest(
        param,
        f"'{param}' is {found}; send an image (PNG, JPEG, WebP, GIF) or a video (MP4, MOV, WebM).",
        "invalid_file",
    )


def _image(path: Path, param: str) -> tuple[tuple[int, int], float]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                _require_size(image.size, param)
                image.load()
                return image.size, 0.0
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise _torn(param, "image") from None


def _video(path: Path, param: str) -> tuple[tuple[int, int], float]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadRequest(param, f"'{param}' holds no picture.", "invalid_file")
            stream = container.streams.video[0]
            size = stream.width, stream.height
            _require_size(size, param)
            seconds = _seconds(container, stream)
            if seconds > MOST_SECONDS:
                raise BadRequest(
                    param,
                    f"'{param}' is {seconds:.0f} s long; at most {MOST_SECONDS:.0f} s.",
                    "invalid_file",
                )
            next(container.decode(stream))
            # Frames that the index promises and the file does not hold: it was cut short.
            container.seek(0, stream=stream)
            packets = container.demux(stream)
            held = sum(packet.size > 0 and not packet.is_corrupt for packet in packets)
            if held < stream.frames:
                raise _torn(param, "video")
            return size, seconds
    except (av.FFmpegError, StopIteration, ValueError):
        raise _torn(param, "video") from None


def _seconds(container: Any, stream: Any) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1e6


def _require_size(size: tuple[int, int], param: str) -> None:
    if min(size) < 1 or size[0] * size[1] > MOST_PIXELS:
        raise BadRequest(
            param,
            f"'{param}' is {size[0]}x{size[1]} pixels; at most {MOST_PIXELS // 1_000_000} million in all.",
            "invalid_file",
        )


def _torn(param: str, kind: str) -> BadRequest:
    return BadRequest(param, f"'{param}' is a damaged or incomplete {kind}.", "invalid_file")
