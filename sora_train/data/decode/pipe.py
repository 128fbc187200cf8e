"""Messages between a process and its child over pipes: pickles with their arrays beside them.

A message is a little header (count and sizes of its parts), the pickle, and each large buffer raw,
so that pixels are copied once. Reading takes a deadline, because the other side may never answer.
"""

import contextlib
import fcntl
import os
import pickle
import select
import struct
import time
from collections.abc import Sequence
from typing import Any

FETCHED = "fetched"
"""What a decode process says where it has read a clip's bytes from remote storage, before it decodes them."""
_COUNT = struct.Struct("<Q")
_PIPE_BYTES = 1 << 20
# What systems take in one call (POSIX: at least 16, Linux and macOS: 1024).
_MOST_VIEWS = 512


class Closed(Exception):
    """The other side closed the pipe, on purpose or by dying."""


class DeadlinePassed(Exception):
    """Nothing complete arrived in time."""


def send(fd: int, message: Any) -> None:
    """Write one message; blocks until the other side has taken it. Raises Closed."""
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(body), *(buffer.raw() for buffer in buffers)]
    header = b"".join(_COUNT.pack(n) for n in (len(parts), *(part.nbytes for part in parts)))
    views = [memoryview(header), *parts]
    try:
        while views:
            _advance(views, os.writev(fd, views[:_MOST_VIEWS]))
    except BrokenPipeError as error:
        raise Closed from error


def receive(fd: int, timeout: float | None = None) -> Any:
    """Read one message within `timeout` seconds (None: wait). Raises Closed or DeadlinePassed."""
    deadline = None if timeout is None else time.monotonic() + timeout
    (num_parts,) = _COUNT.unpack(*_read(fd, [_COUNT.size], deadline))
    sizes = struct.unpack(f"<{num_parts}Q", *_read(fd, [num_parts * _COUNT.size], deadline))
    body, *buffers = _read(fd, sizes, deadline)
    return pickle.loads(body, buffers=buffers)


def _read(fd: int, sizes: Sequence[int], deadline: float | None) -> list[bytearray]:
    """Buffers of these sizes, filled one after the other."""
    buffers = [bytearray(size) for size in sizes]
    views = [memoryview(buffer) for buffer in buffers if buffer]
    while views:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise DeadlinePassed
        count = os.readv(fd, views[:_MOST_VIEWS])
        if count == 0:
            raise Closed
        _advance(views, count)
    return buffers


def _advance(views: list[memoryview], count: int) -> None:
    """Take the first `count` bytes off a list of views."""
    while views and count >= views[0].nbytes:
        count -= views.pop(0).nbytes
    if count:
        views[0] = views[0][count:]


def widen(fd: int) -> None:
    """Let a pipe hold a whole answer of a small clip, so that its writer need not wait for the reader."""
    with contextlib.suppress(
        AttributeError, OSError
    ):  # not on Linux, or more than the system allows
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
