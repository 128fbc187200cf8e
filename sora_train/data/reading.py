"""Byte ranges of remote shards: retried, within a deadline, and kept in a bounded cache on a local disk.

What a server does wrong is a fault of storage, never of the clip: it is tried again, with pauses
that grow, and then stops the run. `http(s)://` needs no further package; other schemes go through
fsspec.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import os
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sora_train.data import remote
from sora_train.data.decode import StorageFault
from sora_train.errors import UserError
from sora_train.keys import key_seed

_HTTP = ("http://", "https://")
PIECE_BYTES = 1 << 20
LONGEST_PAUSE_SECONDS = 10.0
# Below 500, what a server may answer that another attempt can mend.
RETRIED_STATUS = frozenset({408, 425, 429})
# Trimming to less than the bound keeps it from being done at every write.
TRIMMED_SHARE = 0.9
# A temporary file of the cache that is older than this was left by a process that was killed.
STALE_SECONDS = 3600.0


class _Refused(Exception):
    """An answer that no further attempt would change."""


@dataclass(frozen=True)
class ReadPolicy:
    """How remote bytes are read: `retries` after the first attempt, each at most `timeout` seconds.

    With `cache_dir` what was read is kept there, in all at most `cache_bytes`. `first_pause` is the
    mean pause in seconds before the first retry; it doubles with each.
    """

    retries: int = 5
    timeout: float = 30.0
    cache_dir: str = ""
    cache_bytes: int = 0
    first_pause: float = 0.5

    def pause(self, attempt: int, *what: str | int) -> float:
        """Seconds to wait after a failed attempt (0 the first): keyed, and apart for different reads."""
        mean = min(LONGEST_PAUSE_SECONDS, self.first_pause * 2**attempt)
        return mean * (0.5 + key_seed(0, "read_pause", *what, attempt) / 2**63)

    @property
    def deadline(self) -> float:
        """The most seconds that a read may take with all its attempts and pauses."""
        pauses = (
            1.5 * min(LONGEST_PAUSE_SECONDS, self.first_pause * 2**attempt)
            for attempt in range(self.retries)
        )
        return (self.retries + 1) * self.timeout + sum(pauses)


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
    url: str, offset: int, length: int, policy: ReadPolicy | None = None, *, digest: str = ""
) -> bytes:
    """`length` bytes from `offset` on, from the cache where they are in it.

    `digest` is that of the bytes as indexed; it keeps a cache from giving those of an older file.
    Raises StorageFault naming the file and the attempts made.
    """
    policy = policy or ReadPolicy()
    if not length:
        return b""
    if not policy.cache_dir:
        return _with_retries(url, offset, length, policy)
    cache = DiskCache(policy.cache_dir, policy.cache_bytes)
    key = hashlib.sha256(repr((url, offset, length, digest)).encode()).hexdigest()[:40]
    try:
        data = cache.get(key)
        if data is None or len(data) != length:
            data = _with_retries(url, offset, length, policy)
            cache.put(key, data)
    except OSError as error:
        raise StorageFault(
            f"the cache data.disk_cache_dir={policy.cache_dir}: {error.strerror}"
        ) from error
    return data


def _with_retries(url: str, offset: int, length: int, policy: ReadPolicy) -> bytes:
    # The query of a signed address is a secret.
    shown = url.partition("?")[0]
    read = _read_http if url.startswith(_HTTP) else _read_fsspec
    began = time.monotonic()
    attempt = 0
    while True:
        try:
            return _within(policy.timeout, lambda: read(url, offset, length, policy.timeout))
        except _Refused as error:
            said, final = str(error), True
        except TimeoutError:
            said, final = f"no whole answer within data.read_timeout={policy.timeout:g} s", False
        # Each protocol's client has failures of its own kind, and all of them may pass.
        except (OSError, http.client.HTTPException, RuntimeError, ValueError) as error:
            said, final = " ".join(str(error).split())[:200] or type(error).__name__, False
        attempt += 1
        if final or attempt > policy.retries:
            raise StorageFault(
                f"{shown}, {length} bytes from {offset} on: {said} "
                f"({attempt} attempt{'s' * (attempt > 1)} in {time.monotonic() - began:.1f} s)"
            )
        time.sleep(policy.pause(attempt - 1, url, offset))


def _within(seconds: float, read: Callable[[], bytes]) -> bytes:
    """`read()`, given up after `seconds`: a name server or a trickle of bytes knows no deadline of its own."""
    done: Future[bytes] = Future()

    def run() -> None:
        try:
            done.set_result(read())
        # The waiting side must learn of everything.
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True, name="read").start()
    return done.result(timeout=seconds)


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
        said = f"HTTP {error.code} {error.reason}"
        if error.code == 416:
            said += ", the file ends before the index says"
        if error.code >= 500 or error.code in RETRIED_STATUS:
            raise OSError(said) from error
        raise _Refused(said) from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise error.reason from error
        raise OSError(str(error.reason)) from error


def _check_range(answer: http.client.HTTPResponse, offset: int, length: int) -> None:
    """Whether these are the bytes asked for; a server may send the whole file or what there is of it."""
    if answer.status == 200 and offset == 0 and answer.headers["Content-Length"] == str(length):
        return
    if answer.status != 206:
        raise _Refused(f"HTTP {answer.status} with the whole file: the server knows no byte ranges")
    sent = answer.headers.get("Content-Range", "")
    first, _, last = sent.removeprefix("bytes ").partition("/")[0].partition("-")
    if first == str(offset) and last.isdecimal() and int(last) < offset + length - 1:
        raise _Refused(f"the file ends at byte {int(last) + 1}, before the index says")
    if first != str(offset):
        raise OSError(f"another range was sent, {sent or 'without saying which'}")


def _read_fsspec(url: str, offset: int, length: int, _timeout: float) -> bytes:
    try:
        data: bytes = remote.filesystem(url).cat_file(url, start=offset, end=offset + length)
    except UserError as error:
        raise _Refused(str(error)) from error
    except (FileNotFoundError, PermissionError) as error:
        raise _Refused(f"{type(error).__name__}: {error}") from error
    # The clients of S3 and Google raise what they please; all but the above may pass.
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    if len(data) != length:
        raise OSError(f"{len(data)} bytes came of {length}")
    return data


class DiskCache:
    """A folder of byte strings, in all at most `max_bytes`: those not used for longest go first.

    Any number of processes of a machine may share it. Contents carry a checksum, so that a damaged
    file is a miss. Errors of the disk are raised as OSError.
    """

    def __init__(self, folder: Path | str, max_bytes: int):
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.bytes"

    def get(self, key: str) -> bytes | None:
        """The bytes stored under a key, which are then the last used; None where there are none."""
        path = self.path(key)
        try:
            stored = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        data, checksum = stored[:-4], stored[-4:]
        if checksum != zlib.crc32(data).to_bytes(4, "big"):
            path.unlink(missing_ok=True)
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Store bytes, where they fit at all, after making room for them."""
        size = len(data) + 4
        if size > self.max_bytes:
            return
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.write(zlib.crc32(data).to_bytes(4, "big"))
            with self._locked() as account:
                if not path.exists():
                    self._make_room(account, size)
                    os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        """The file that holds the sum of all sizes, for one process at a time."""
        with (self.folder / "bytes.txt").open("a+") as account:
            fcntl.flock(account, fcntl.LOCK_EX)
            yield account

    def _make_room(self, account: IO[str], size: int) -> None:
        """Book `size` bytes more; beforehand, so that a process killed in between books too many."""
        account.seek(0)
        booked = account.read()
        total = int(booked) if booked.isdecimal() else None
        if total is None or total + size > self.max_bytes:
            total = self._trim(size)
        account.truncate(0)
        account.write(str(total + size))

    def _trim(self, size: int) -> int:
        """Count what is there, and remove the least recently used where `size` more would not fit."""
        files: list[tuple[int, int, Path]] = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if path.suffix == ".bytes":
                    files.append((stat.st_mtime_ns, stat.st_size, path))
                elif time.time() - stat.st_mtime > STALE_SECONDS:
                    path.unlink()
        total = sum(count for _, count, _ in files)
        if total + size <= self.max_bytes:
            return total
        for _, count, path in sorted(files):
            if total + size <= max(size, int(self.max_bytes * TRIMMED_SHARE)):
                break
            path.unlink(missing_ok=True)
            total -= count
        return total
