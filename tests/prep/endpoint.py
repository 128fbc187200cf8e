"""A chat completions endpoint on the loopback that plays what a test wants of it, and counts what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = {
    "subject": "a red circle",
    "action": "it moves across the picture",
    "setting": "a plain grey background",
    "camera": "static camera",
    "lighting": "even light",
    "style": "animation",
    "short": "A red circle moves across a grey background.",
    "dense": "A red circle moves from the left to the right of a plain grey background. The shot is static.",
}
Says = tuple[int, dict[str, str], bytes]


def completion(content: Any, sent: int = 900, answered: int = 100, **choice: Any) -> Says:
    """A chat completion; `content` is written as JSON unless it is a text."""
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    message = {"role": "assistant", "content": text} | choice.pop("message", {})
    usage = {"prompt_tokens": sent, "completion_tokens": answered}
    answer = {"choices": [{"message": message, "finish_reason": "stop"} | choice], "usage": usage}
    return 200, {}, json.dumps(answer).encode()


@dataclass
class Endpoint:
    """What was asked; `plays(number, body)` says what is answered to the request with this number, from 0."""

    plays: Callable[[int, dict], Says]
    url: str = ""
    bodies: list[dict] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: Any = field(default_factory=threading.Lock)


@contextmanager
def endpoint(plays: Callable[[int, dict], Says] | None = None) -> Iterator[Endpoint]:
    served = Endpoint(plays or (lambda number, body: completion(GOOD)))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._write(404, {}, b"no list of models")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                number = len(served.bodies)
                served.bodies.append(body)
                served.keys.append(self.headers.get("Authorization", ""))
                served.times.append(time.monotonic())
                served.at_once += 1
                served.most_at_once = max(served.most_at_once, served.at_once)
            try:
                self._write(*served.plays(number, body))
            finally:
                with served.lock:
                    served.at_once -= 1

        def _write(self, status: int, headers: dict[str, str], data: bytes) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle(self) -> None:
            # The client has given up, as some tests want it to.
            with suppress(BrokenPipeError, ConnectionResetError):
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
