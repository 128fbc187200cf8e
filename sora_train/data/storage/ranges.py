"""A part of a file as a file of its own, the digest of its bytes, and the error of storage that fails."""

from __future__ import annotations

import hashlib
import io
from typing import Any

# Enough of each end to tell two clips apart where reading the middle would cost too much.
DIGEST_END_BYTES = 1 << 16


class StorageFault(Exception):
    """The bytes could not be read: no fault of the clip."""


class PartOfFile(io.RawIOBase):
    """`length` bytes from `offset` on as a file of its own; what reads them is a subclass's.

    A read that fails is remembered in `fault`: libav would report it as damage of the clip.
    """

    def __init__(self, name: str, offset: int, length: int):
        super().__init__()
        self.fault = ""
        self.name = name
        self._offset, self._length, self._position = offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position


class ByteRange(PartOfFile):
    """A part of a local file, so that a tar's member is decoded where it lies.

    `data` are its bytes where they were read already.
    """

    def __init__(self, path: str, offset: int, length: int, data: bytes | None = None):
        super().__init__(path, offset if data is None else 0, length)
        self._file: io.RawIOBase | io.BytesIO
        if data is not None:
            self._file = io.BytesIO(data)
            return
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise StorageFault(f"{path}: {error.strerror}") from error

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        length = min(len(view), max(0, self._length - self._position))
        done = 0
        try:
            self._file.seek(self._offset + self._position)
            while done < length:
                count = self._file.readinto(view[done:length])
                if not count:
                    missing = self._length - self._position - done
                    raise OSError(0, f"ends {missing} bytes before the index says")
                done += count
        except OSError as error:
            self.fault = f"{self.name}: {error.strerror}"
            raise
        self._position += done
        return done

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def read_bytes(path: str, offset: int, length: int) -> bytes:
    """A part of a local file. Raises StorageFault where the file is missing or too short."""
    with ByteRange(path, offset, length) as file:
        try:
            return file.readall() or b""
        except OSError as error:
            raise StorageFault(file.fault) from error


def digest_of_ends(file: Any, length: int) -> str:
    """The digest of a file's length and of its first and last DIGEST_END_BYTES: 32 hex digits of a SHA-256."""
    state = hashlib.sha256(f"ends {length} ".encode())
    for start in (0, max(0, length - DIGEST_END_BYTES)):
        file.seek(start)
        state.update(file.read(DIGEST_END_BYTES) or b"")
    return state.hexdigest()[:32]


def is_digest_of(digest: str, data: bytes) -> bool:
    """Whether a sample's digest is that of these bytes, however much of them the index looked at."""
    # The ends first, since they cost next to nothing.
    return digest == digest_of_ends(io.BytesIO(data), len(data)) or (
        digest == hashlib.sha256(data).hexdigest()[:32]
    )
