"""A raw server on the loopback that sends what a test wants, byte by byte if asked to."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

Plays = Callable[[bytes], Iterable[bytes]]


@dataclass
class Rude:
    port: int
    asked: list[bytes] = field(default_factory=list)
    """Each request, its body included: a client may send that apart from the head."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def rude_server(plays: Plays, drip: float = 0.0) -> Iterator[Rude]:
    """`plays(head)` gives the pieces of the answer to a request; `drip` seconds pass between them."""
    listening = socket.create_server(("127.0.0.1", 0))
    served, closing = Rude(listening.getsockname()[1]), threading.Event()

    def serve(peer: socket.socket) -> None:
        with peer, suppress(OSError):
            head = b""
            while not _is_whole(head) and (piece := peer.recv(1 << 16)):
                head += piece
            served.asked.append(head)
            for piece in plays(head):
                peer.sendall(piece)
                if drip and closing.wait(drip):
                    return

    def accept() -> None:
        with suppress(OSError):
            while True:
                peer, _ = listening.accept()
                threading.Thread(target=serve, args=(peer,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        closing.set()
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(5)


def _is_whole(request: bytes) -> bool:
    head, end, body = request.partition(b"\r\n\r\n")
    told = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return bool(end) and len(body) >= int(told[1] if told else 0)


def answer(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer; a header named `content_length=...` takes the place of the right one."""
    told = {"content_length": str(len(body))} | headers
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in told.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def slowly(data: bytes) -> Iterator[bytes]:
    """One byte at a time."""
    for place in range(len(data)):
        yield data[place : place + 1]


def silent(seconds: float) -> Iterator[bytes]:
    time.sleep(seconds)
    yield b""
