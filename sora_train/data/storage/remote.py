"""Names, sizes, fingerprints and byte ranges of local and remote shards.

Addresses (`https://`, `s3://`, `gs://` and others) are read through fsspec; a plain path is a local file.
A remote read is retried with growing pauses; a lasting failure is a fault of storage, never of a clip.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from sora_train.data.storage.ranges import PartOfFile, StorageFault
from sora_train.data.storage.retry import NotRetryable, ReadPolicy, T, retried
from sora_train.errors import UserError

ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.5
STALLED_SECONDS = 20.0
BLOCK_BYTES = 1 << 18
# A fingerprint reads so many bytes at so many places: cheap before every run, and different for another shard.
_FINGERPRINT_BYTES, _FINGERPRINT_PLACES = 1024, 8
# Scheme -> the package that fsspec needs for it, and the extra that installs it.
_PACKAGES = {
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gs"),
    "gcs": ("gcsfs", "gs"),
}
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
MISSING = -1


def is_remote(name: str) -> bool:
    """Whether a shard's name is an address rather than a path."""
    return "://" in name


def expand(pattern: str) -> list[str]:
    """The names a pattern stands for, in order: `a-{000..010}.tar`, `{x,y}.tar`, and `*` or `?` that exist.

    Raises UserError on braces that cannot be read, and on a `*` that matches nothing.
    """
    parts = _BRACES.split(pattern)
    choices = [[part] if at % 2 == 0 else _choices(part, pattern) for at, part in enumerate(parts)]
    names = map("".join, itertools.product(*choices))
    return [path for name in names for path in _expand_wildcards(name, pattern)]


def _choices(inside: str, pattern: str) -> list[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        if "," not in inside:
            raise UserError(
                f"source={pattern}: '{{{inside}}}' is neither a range like {{000..010}} nor a choice like {{a,b}}"
            )
        return inside.split(",")
    first, last = numbers.groups()
    if int(first) > int(last):
        raise UserError(
            f"source={pattern}: the range {{{inside}}} runs backwards; write {{{last}..{first}}}"
        )
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]


def _expand_wildcards(name: str, pattern: str) -> list[str]:
    # An address may hold a question mark of its own (`?versionId=`).
    marks = "*" if is_remote(name) else "*?"
    if not any(mark in name for mark in marks):
        return [name]
    if is_remote(name):
        system = filesystem(name)
        paths = [system.unstrip_protocol(path) for path in system.glob(name)]
    else:
        paths = glob.glob(os.path.expanduser(name), recursive=True)
    if not paths:
        raise UserError(f"source={pattern} matches no file; check the pattern")
    return sorted(paths)


@lru_cache
def _of_scheme(scheme: str) -> Any:
    package, extra = _PACKAGES.get(scheme, ("", ""))
    try:
        if package:
            module = importlib.import_module(package)
        fsspec = importlib.import_module("fsspec")
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs the package {package or 'fsspec'}; install it with "
            f"`pip install 'sora_train[{extra or 'http'}]'`"
        ) from error
    options: dict[str, Any] = {}
    if package == "aiohttp":
        limit = module.ClientTimeout(sock_connect=STALLED_SECONDS, sock_read=STALLED_SECONDS)
        options = {"client_kwargs": {"timeout": limit}}
    elif package == "s3fs":
        options = {
            "config_kwargs": {
                "connect_timeout": STALLED_SECONDS,
                "read_timeout": STALLED_SECONDS,
                "retries": {"total_max_attempts": 1},  # s3fs tries again, and so do we
            }
        }
    try:
        return fsspec.filesystem(scheme, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{scheme}:// cannot be read: {error}") from error


def filesystem(url: str) -> Any:
    """fsspec's file system of an address. Raises UserError naming the package that is missing and its extra."""
    return _of_scheme(url.partition("://")[0].lower())


def size_of(name: str) -> int:
    """Bytes of a shard, MISSING where there is none. Raises StorageFault."""
    if not is_remote(name):
        try:
            return os.stat(name).st_size
        except FileNotFoundError:
            return MISSING
        except OSError as error:
            raise StorageFault(f"{name}: {error.strerror}") from error
    size = _again(name, lambda: _asked(lambda: _size(name)))
    if size is None:
        raise StorageFault(
            f"{name}: the server does not report the size, as one with byte ranges would"
        )
    return int(size)


def _size(name: str) -> int | None:
    try:
        size: int | None = filesystem(name).info(name)["size"]
    except FileNotFoundError:
        return MISSING
    return size


def read_range(name: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a remote file. Raises StorageFault."""
    return _again(name, lambda: read_once(name, start, end - start))


def read_once(name: str, start: int, length: int, _timeout: float = math.inf) -> bytes:
    """`length` bytes from `start` on, in one attempt. Raises NotRetryable, or OSError where another may help."""
    data: bytes = _asked(lambda: filesystem(name).cat_file(name, start=start, end=start + length))
    if len(data) > length:
        raise NotRetryable(
            "the server sends the whole file where a byte range was asked for; copy the shards here first"
        )
    if len(data) < length:
        raise OSError(0, f"{len(data)} of {length} bytes came from byte {start} on")
    return data


def _again(name: str, read: Callable[[], T]) -> T:
    """`read()`, retried where the network or the server failed; the client itself times out stalled reads."""
    filesystem(name)  # a missing package is not retried
    policy = ReadPolicy(ATTEMPTS - 1, math.inf, first_pause=FIRST_PAUSE_SECONDS)
    return retried(read, policy, name.partition("?")[0], name)


def _asked(ask: Callable[[], T]) -> T:
    """The answer of fsspec; its failures are raised as NotRetryable or OSError."""
    try:
        return ask()
    except UserError as error:
        raise NotRetryable(str(error)) from error
    except FileNotFoundError as error:
        raise NotRetryable("it does not exist (any more)") from error
    except PermissionError as error:
        raise NotRetryable(f"access is denied ({error})") from error
    # Each protocol's client raises its own exceptions, and all of them may be temporary.
    except Exception as error:
        message = " ".join(str(error).split())
        raise OSError(
            f"{type(error).__name__}: {message}" if message else type(error).__name__
        ) from error


class RemoteRange(PartOfFile):
    """A part of a remote file, read block by block."""

    def __init__(self, url: str, offset: int, length: int):
        super().__init__(url, offset, length)
        self._block, self._block_start = b"", 0

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length = min(len(view), max(0, self._length - self._position))
        inside = self._position - self._block_start
        if length and not 0 <= inside <= len(self._block) - length:
            self._fetch(length)
            inside = 0
        view[:length] = self._block[inside : inside + length]
        self._position += length
        return length

    def _fetch(self, length: int) -> None:
        end = min(self._length, self._position + max(length, BLOCK_BYTES))
        try:
            self._block = read_range(self.name, self._offset + self._position, self._offset + end)
        except StorageFault as error:
            self.fault = str(error)
            raise OSError(0, self.fault) from error
        self._block_start = self._position


def fingerprint(name: str, size: int) -> str:
    """A digest of a shard's size and of a few places in it: detects another shard, not every flipped bit."""
    state = hashlib.sha256(str(size).encode())
    last = max(0, size - _FINGERPRINT_BYTES)
    places = sorted({last * at // (_FINGERPRINT_PLACES - 1) for at in range(_FINGERPRINT_PLACES)})
    if is_remote(name):
        # Each place is a request; the two ends of a tar differ where anything does.
        for start in sorted({places[0], places[-1]}) if size else ():
            state.update(read_range(name, start, min(size, start + _FINGERPRINT_BYTES)))
        return state.hexdigest()[:32]
    try:
        with open(name, "rb") as file:
            for start in places:
                file.seek(start)
                state.update(file.read(_FINGERPRINT_BYTES))
    except OSError as error:
        raise StorageFault(f"{name}: {error.strerror}") from error
    return state.hexdigest()[:32]


def common_root(names: Sequence[str]) -> Path:
    """The folder in which all local shards lie."""
    local = [os.path.dirname(os.path.abspath(name)) for name in names if not is_remote(name)]
    return Path(os.path.commonpath(local)) if local else Path.cwd()
