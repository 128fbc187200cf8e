"""Messages between a process and its child over pipes: pickles with their arrays beside them.

A message is a little header (count and sizes of its parts), the pickle, and each large buffer raw,
so that pixels are copied once. Reading takes a deadline, because the other side may never answer.
"""

import os
import pickle
import select
import struct
import time
from typing import Any

_COUNT = struct.Struct("<Q")
_CHUNK = 1 << 20


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
    try:
        for part in (memoryview(header), *parts):
            sent = 0
            while sent < part.nbytes:
                sent += os.write(fd, part[sent : sent + _CHUNK])
    except BrokenPipeError as error:
        raise Closed from error


def receive(fd: int, timeout: float | None = None) -> Any:
    """Read one message within `timeout` seconds (None: wait). Raises Closed or DeadlinePassed."""
    deadline = None if timeout is None else time.monotonic() + timeout
    (num_parts,) = _COUNT.unpack(_read(fd, _COUNT.size, deadline))
    sizes = struct.unpack(f"<{num_parts}Q", _read(fd, num_parts * _COUNT.size, deadline))
    body, *buffers = (_read(fd, size, deadline) for size in sizes)
    return pickle.loads(body, buffers=buffers)


def _read(fd: int, size: int, deadline: float | None) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    filled = 0
    while filled < size:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise DeadlinePassed
        count = os.readv(fd, [view[filled : filled + _CHUNK]])
        if count == 0:
            raise Closed
        filled += count
    return data
