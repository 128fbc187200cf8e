"""An HTTP server on loopback that serves byte ranges of a folder, and misbehaves when it is told to."""

import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """Serves `folder`; each request takes the next of `faults`, or `always` where none is left.

    Faults: a status (`503`), `stall` (never answers), `trickle` (a byte now and then), `half` (closes
    half way), `other` (another range), `whole` (knows no ranges).
    """

    daemon_threads = True

    def __init__(self, folder: Path, handler: type["Handler"] | None = None):
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.folder = folder
        self.faults: deque[str] = deque()
        self.always = ""
        self.pause = 0.0
        self.asked: list[tuple[str, str]] = []
        self.closing = threading.Event()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def __enter__(self) -> "RangeServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A reader that gave up is no news."""


class Handler(BaseHTTPRequestHandler):
    server: RangeServer

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:  # noqa: N802 - the library's name
        server = self.server
        asked = self.headers.get("Range", "")
        server.asked.append((self.path, asked))
        fault = server.faults.popleft() if server.faults else server.always
        if fault.isdecimal():
            self.send_error(int(fault))
            return
        if fault == "stall":
            server.closing.wait(20)
            return
        path = server.folder / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        time.sleep(server.pause)
        data = path.read_bytes()
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), min(len(data), int(last) + 1)
        if start >= len(data):
            self.send_error(416)
            return
        if fault == "other":
            start, end = start + 1, end + 1
        whole = fault == "whole"
        body = data if whole else data[start:end]
        self.send_response(200 if whole else 206)
        self.send_header("Content-Length", str(len(body)))
        if not whole:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        if fault == "trickle":
            for at in range(len(body)):
                self.wfile.write(body[at : at + 1])
                time.sleep(0.05)
        self.wfile.write(body[: len(body) // 2] if fault == "half" else body)
