"""A source: a file of footage, or a part of one, before anything of it is read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sora_train.data.index.kinds import media_kind
from sora_train.data.storage.ranges import StorageFault
from sora_train.data.storage.remote import MISSING, filesystem, is_remote, size_of


@dataclass(frozen=True)
class Source:
    """What is listed of a source. `path` is a local path or an address; `length` bytes from `offset` on are its own.

    `stamp` changes where the bytes do, as far as the storage knows. `provenance` is a JSON object of what else was
    said of it. `begin` and `end` are seconds (None: all of it). `reason` says why it cannot be used, `detail` more.
    """

    key: str
    path: str = ""
    offset: int = 0
    length: int = 0
    stamp: str = ""
    kind: str = "video"
    given_caption: str = ""
    given_captions: str = ""
    licence: str = ""
    provenance: str = ""
    range_begin: float | None = None
    range_end: float | None = None
    drop_reason: str = ""
    drop_detail: str = ""


def file_source(key: str, path: str) -> Source:
    """The source that a whole file is, here or behind an address; one that is not there has the reason."""
    kind = media_kind(path.partition("?")[0])
    if is_remote(path):
        try:
            length = size_of(path)
        except StorageFault as error:
            return Source(key, path, kind=kind, drop_reason="unreachable", drop_detail=str(error))
        if length == MISSING:
            return Source(
                key, path, kind=kind, drop_reason="missing", drop_detail="it does not exist"
            )
        return Source(key, path, length=length, stamp=_remote_stamp(path, length), kind=kind)
    try:
        stat = os.stat(path)
    except OSError as error:
        return Source(key, path, kind=kind, drop_reason="missing", drop_detail=error.strerror or "")
    stamp = f"{stat.st_size} {stat.st_mtime_ns}"
    return Source(key, str(Path(path).resolve()), length=stat.st_size, stamp=stamp, kind=kind)


def _remote_stamp(url: str, length: int) -> str:
    """What the storage says of a file's version; its size, where it says no more."""
    told = filesystem(url).info(url)
    named = (told.get(name) for name in ("ETag", "etag", "md5Hash", "LastModified", "mtime"))
    return f"{length} {next((value for value in named if value), '')}".strip()
