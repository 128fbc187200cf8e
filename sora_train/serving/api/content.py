"""The files of a video: whole, or the range of bytes that a player asks for."""

import re
from collections.abc import Iterator
from typing import BinaryIO

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from sora_train.serving.errors import BadRequest, NotFound
from sora_train.serving.jobs.files import FileStore
from sora_train.serving.jobs.job import Job

KINDS = {
    "video": ("video/mp4", "mp4"),
    "thumbnail": ("image/webp", "webp"),
    "spritesheet": ("image/jpeg", "jpg"),
}
_PIECE = 1 << 18
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


def content(request: Request, files: FileStore, job: Job, variant: str) -> Response:
    """The answer with a file of a job. Raises BadRequest before there is one, NotFound when it is gone."""
    if job.status != "completed":
        raise BadRequest(
            "video_id", f"The video is {job.status}; it has no content.", "video_not_ready"
        )
    name = job.outputs.get(variant)
    if name is None:
        raise NotFound("The video's files have expired.", param="video_id", code="video_expired")
    try:
        file, size = files.open(name), files.size(name)
    except FileNotFoundError:
        size = None
    if size is None:
        raise NotFound("The video's files are gone.", param="video_id", code="video_expired")
    kind, ending = KINDS[variant]
    tag = f'"{job.id}-{variant}-{size:x}"'
    headers = {
        "accept-ranges": "bytes",
        "cache-control": "private, max-age=3600",
        "content-disposition": f'inline; filename="{job.id}.{ending}"',
        "etag": tag,
        "x-content-type-options": "nosniff",
    }
    # A range of another version of the file would not fit what the player has.
    is_same = request.headers.get("if-range", tag) == tag
    part = byte_range(request.headers.get("range", "") if is_same else "", size)
    if part is not None and part[0] >= part[1]:
        file.close()
        return Response(status_code=416, headers={**headers, "content-range": f"bytes */{size}"})
    first, end = part or (0, size)
    headers["content-length"] = str(end - first)
    if part is not None:
        headers["content-range"] = f"bytes {first}-{end - 1}/{size}"
    status = 200 if part is None else 206
    return StreamingResponse(_pieces(file, first, end), status, headers, kind)


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """[first, end) of a Range header; empty where the file has no such bytes, None for the whole file.

    Several ranges at once, and what is no range, are answered with the whole file, as RFC 9110 allows.
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)) if int(last) else size, size
    if last and int(last) < int(first):
        return None
    return int(first), min(int(last) + 1, size) if last else size


def _pieces(file: BinaryIO, first: int, end: int) -> Iterator[bytes]:
    with file:
        file.seek(first)
        left = end - first
        while left > 0 and (piece := file.read(min(_PIECE, left))):
            left -= len(piece)
            yield piece
