"""Byte ranges of remote shards: retried, within a deadline, checked, and kept in a bounded cache on a local disk.

A failure of the server is a fault of storage, never of the clip: it is retried with growing pauses and
then stops the run. `http(s)://` needs no further package; other schemes go through fsspec. With a cache
a shard is read in aligned blocks, so that many small clips are few requests.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sora_train.data.storage import remote
from sora_train.data.storage.disk_cache import DiskCache
from sora_train.data.storage.ranges import StorageFault, is_digest_of
from sora_train.data.storage.retry import NotRetryable, ReadPolicy, retried
from sora_train.errors import UserError

if TYPE_CHECKING:
    from sora_train.data.manifest import Stamp

_HTTP = ("http://", "https://")
PIECE_BYTES = 1 << 20
# Status codes below 500 after which another attempt may succeed.
RETRIED_STATUS = frozenset({408, 425, 429})


def require(paths: Iterable[str], cache_dir: str = "") -> None:
    """Raise UserError where an address's scheme needs a package that is missing, or the cache cannot be kept."""
    schemes = {path.partition("://")[0]: path for path in paths if remote.is_remote(path)}
    for path in schemes.values():
        if not path.startswith(_HTTP):
            remote.filesystem(path)
    if schemes and cache_dir:
        folder = Path(cache_dir).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise UserError(
                f"data.disk_cache_dir={cache_dir} cannot be written; name a folder on a local disk"
            )


def read_range(
    url: str,
    offset: int,
    length: int,
    policy: ReadPolicy | None = None,
    *,
    digest: str = "",
    stamp: Stamp | None = None,
) -> bytes:
    """`length` bytes from `offset` on, from the cache where they are in it.

    `digest` is that of the bytes as indexed, `stamp` that of the whole file; either keeps a cache from
    giving bytes of an older file, and a file without a stamp is kept range by range. Raises
    StorageFault naming the file and the attempts made, or that the bytes are not those indexed.
    """
    policy = policy or ReadPolicy()
    if not length:
        return b""
    cached = _Cached(url, policy, stamp, digest) if policy.cache_dir else None
    # The cache may hold an older file, and the answer may be damaged: try once more without the cache.
    for _ in range(2):
        data = cached.read(offset, length) if cached else fetch(url, offset, length, policy)
        if not digest or is_digest_of(digest, data):
            return data
        if cached is not None:
            cached.forget(offset, length)
    raise StorageFault(
        f"{shown(url)}: the {length} bytes from {offset} on are not those that were indexed, so the shard changed "
        "since; restore it, or give the new one a new name and index it"
    )


def shown(url: str) -> str:
    """An address for a message: the query of a signed one is a secret."""
    return url.partition("?")[0]


def fetch(
    url: str, offset: int, length: int, policy: ReadPolicy, ends: float = float("inf")
) -> bytes:
    """Bytes from the server, `ends` the latest time for another attempt. Raises StorageFault."""
    read = _read_http if url.startswith(_HTTP) else remote.read_once
    return retried(
        lambda: read(url, offset, length, policy.timeout),
        policy,
        f"{shown(url)}, {length} bytes from {offset} on",
        url,
        offset,
        ends=ends,
    )


class _Cached:
    """A file's bytes through the cache: in aligned blocks where its stamp is known, else range by range."""

    def __init__(self, url: str, policy: ReadPolicy, stamp: Stamp | None, digest: str):
        self._url, self._policy = url, policy
        self._size, self._name = stamp if stamp is not None else (0, digest)
        self._cache = DiskCache(policy.cache_dir, policy.cache_bytes)

    def read(self, offset: int, length: int) -> bytes:
        try:
            return self._read(offset, length)
        except OSError as error:
            raise StorageFault(
                f"the cache data.disk_cache_dir={self._policy.cache_dir}: {error.strerror}"
            ) from error

    def forget(self, offset: int, length: int) -> None:
        """Drop what the cache holds of a range."""
        for start, count in self._pieces(offset, length):
            self._cache.drop(self._key(start, count))

    def _key(self, start: int, count: int) -> str:
        return hashlib.sha256(repr((self._url, start, count, self._name)).encode()).hexdigest()[:40]

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The entries of the cache, (start, bytes): the blocks that a range touches, or the range itself."""
        size, block = self._size, self._policy.block_bytes
        if not size or offset + length > size:
            return [(offset, length)]
        begin = offset // block * block
        return [(start, min(block, size - start)) for start in range(begin, offset + length, block)]

    def _read(self, offset: int, length: int) -> bytes:
        # One process fetches a piece while others wait; the time for its own attempts begins after the wait.
        waits = time.monotonic() + self._policy.timeout
        pieces = self._pieces(offset, length)
        parts = {piece: self._part(piece, offset, length) for piece in pieces}
        missing = [piece for piece in pieces if parts[piece] is None]
        if missing:
            with self._cache.fetching([self._key(*piece) for piece in missing], waits):
                for piece in missing:
                    parts[piece] = self._part(piece, offset, length)
                missing = [piece for piece in missing if parts[piece] is None]
                ends = time.monotonic() + self._policy.attempts_seconds
                for run in _adjacent(missing):
                    for piece, data in self._fetched(run, ends):
                        parts[piece] = data[_inside(piece, offset, length)]
        return b"".join(parts[piece] or b"" for piece in pieces)

    def _part(self, piece: tuple[int, int], offset: int, length: int) -> bytes | None:
        """The part of a range in one piece from the cache, None where it is missing or too short."""
        inside = _inside(piece, offset, length)
        data = self._cache.get(self._key(*piece), inside.start, inside.stop)
        return data if data is not None and len(data) == inside.stop - inside.start else None

    def _fetched(
        self, run: list[tuple[int, int]], ends: float
    ) -> list[tuple[tuple[int, int], bytes]]:
        """Adjacent pieces, fetched in one request and stored."""
        begin = run[0][0]
        data = fetch(self._url, begin, sum(count for _, count in run), self._policy, ends)
        parts = [(piece, data[piece[0] - begin : sum(piece) - begin]) for piece in run]
        for piece, part in parts:
            self._cache.put(self._key(*piece), part)
        return parts


def _inside(piece: tuple[int, int], offset: int, length: int) -> slice:
    """The part of a piece that belongs to a range, counted from the piece's start."""
    start, count = piece
    return slice(max(0, offset - start), min(count, offset + length - start))


def _adjacent(pieces: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The pieces in runs without gaps."""
    runs: list[list[tuple[int, int]]] = []
    for piece in pieces:
        if runs and sum(runs[-1][-1]) == piece[0]:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _read_http(url: str, offset: int, length: int, timeout: float) -> bytes:
    ends = time.monotonic() + timeout
    request = urllib.request.Request(
        urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]"),
        headers={"Range": f"bytes={offset}-{offset + length - 1}", "User-Agent": "sora_train"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            _check_range(answer, offset, length)
            data = bytearray()
            while len(data) < length:
                piece = answer.read1(min(PIECE_BYTES, length - len(data)))
                if not piece:
                    raise OSError(f"the connection closed after {len(data)} of {length} bytes")
                if time.monotonic() > ends:
                    raise TimeoutError
                data += piece
            return bytes(data)
    except urllib.error.HTTPError as error:
        error.close()
        message = f"HTTP {error.code} {error.reason}"
        if error.code == 416:
            message += ", the file ends before the index says"
        if error.code >= 500 or error.code in RETRIED_STATUS:
            raise OSError(message) from error
        raise NotRetryable(message) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise error.reason from error
        raise OSError(str(error.reason)) from error


def _check_range(answer: http.client.HTTPResponse, offset: int, length: int) -> None:
    """Raises NotRetryable or OSError where the answer holds other bytes than the request."""
    if answer.status == 200 and offset == 0 and answer.headers["Content-Length"] == str(length):
        return
    if answer.status != 206:
        raise NotRetryable(
            f"HTTP {answer.status} with the whole file: the server knows no byte ranges"
        )
    sent = answer.headers.get("Content-Range", "")
    first, _, last = sent.removeprefix("bytes ").partition("/")[0].partition("-")
    if first == str(offset) and last.isdecimal() and int(last) < offset + length - 1:
        raise NotRetryable(f"the file ends at byte {int(last) + 1}, before the index says")
    if first != str(offset):
        raise OSError(f"another range was sent, {sent or 'without saying which'}")
