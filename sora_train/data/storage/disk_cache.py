"""A bounded folder on a local disk that keeps remote bytes, shared by the machine's processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

# Trimming to less than the bound keeps it from being done at every write.
TRIMMED_SHARE = 0.9
# A temporary file of the cache that is older than this was left by a process that was killed.
STALE_SECONDS = 3600.0
_POLL_SECONDS = 0.02
_CHECKSUM_BYTES = 4
# Inode and time of writing of the files whose checksum this process has checked.
_CHECKED: dict[Path, tuple[int, int]] = {}
_MOST_REMEMBERED = 100_000


class DiskCache:
    """A folder of byte strings, in all at most `max_bytes`: the least recently used go first.

    Any number of processes of a machine may share it. Contents carry a checksum, so that a damaged
    file is a miss. Errors of the disk are raised as OSError.
    """

    def __init__(self, folder: Path | str, max_bytes: int):
        self.folder = Path(folder).expanduser()
        self.max_bytes = max_bytes

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.bytes"

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes | None:
        """The bytes stored under a key, or a part of them; None where there are none. They count as used now.

        A process reads and checks a file whole only once; later reads of parts are not checked.
        """
        path = self.path(key)
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                # Only the time of access is set; that of modification still tells when the file was written.
                os.utime(file.fileno(), ns=(time.time_ns(), stat.st_mtime_ns))
                written = (stat.st_ino, stat.st_mtime_ns)
                if end is not None and _CHECKED.get(path) == written:
                    file.seek(start)
                    return file.read(end - start)
                stored = file.read()
        except FileNotFoundError:
            return None
        data, checksum = stored[:-_CHECKSUM_BYTES], stored[-_CHECKSUM_BYTES:]
        if checksum != zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "big"):
            path.unlink(missing_ok=True)
            return None
        if len(_CHECKED) >= _MOST_REMEMBERED:
            _CHECKED.clear()
        _CHECKED[path] = written
        return data[start:end]

    def drop(self, key: str) -> None:
        """Forget what is stored under a key."""
        self.path(key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def fetching(self, keys: Iterable[str], ends: float) -> Iterator[None]:
        """A lock of the process that fetches these keys; others wait until `ends` (of `time.monotonic`).

        The lock ends with its process. A process that is stuck delays the others until `ends` only;
        fetching twice is harmless.
        """
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            # In one order for everybody, or two could wait for each other.
            for name in sorted({key[:3] for key in keys}):
                file = held.enter_context((folder / name).open("a"))
                while not _locks(file) and time.monotonic() < ends:
                    time.sleep(_POLL_SECONDS)
            yield

    def put(self, key: str, data: bytes) -> None:
        """Store bytes after making room for them; more than `max_bytes` are not stored."""
        size = len(data) + _CHECKSUM_BYTES
        if size > self.max_bytes:
            return
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.write(zlib.crc32(data).to_bytes(_CHECKSUM_BYTES, "big"))
            with self._locked() as account:
                if not path.exists():
                    self._make_room(account, size)
                    os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        """The file with the sum of all sizes, locked for this process."""
        with (self.folder / "bytes.txt").open("a+") as account:
            fcntl.flock(account, fcntl.LOCK_EX)
            yield account

    def _make_room(self, account: IO[str], size: int) -> None:
        """Add `size` to the sum before the file is there, so that a process killed in between counts too much."""
        account.seek(0)
        booked = account.read()
        total = int(booked) if booked.isdecimal() else None
        if total is None or total + size > self.max_bytes:
            total = self._trim(size)
        account.truncate(0)
        account.write(str(total + size))

    def _trim(self, size: int) -> int:
        """The sum of all sizes, after removing the least recently used files where `size` more would not fit."""
        files: list[tuple[int, int, Path]] = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if path.suffix == ".bytes":
                    files.append((max(stat.st_atime_ns, stat.st_mtime_ns), stat.st_size, path))
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


def _locks(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
