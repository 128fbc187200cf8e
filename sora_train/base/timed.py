"""HTTP answers that must be whole within a time: a server that drips bytes outlasts the timeout of a socket."""

import http.client
import io
import socket
import time
import urllib.request
from typing import Any, cast


class TimedResponse(http.client.HTTPResponse):
    """An answer, of which head and body must have come within the timeout that its socket had when it was asked for.

    Reading later raises TimeoutError.
    """

    def __init__(self, sock: socket.socket, *args: Any, **named: Any):
        super().__init__(sock, *args, **named)
        self.fp: Any = io.BufferedReader(_Timed(sock, cast(Any, self.fp).detach()))


class _Timed(io.RawIOBase):
    def __init__(self, sock: socket.socket, raw: io.RawIOBase):
        self._sock, self._raw = sock, raw
        seconds = sock.gettimeout()
        self._end = None if seconds is None else time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._end is not None:
            left = self._end - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self._sock.settimeout(left)
        return cast(Any, self._raw).readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Connection(http.client.HTTPConnection):
    response_class = TimedResponse


class _SecureConnection(http.client.HTTPSConnection):
    response_class = TimedResponse


class TimedHTTP(urllib.request.HTTPHandler):
    """For `urllib.request.build_opener`: addresses of http:// whose answers are timed."""

    def http_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_Connection, req)


class TimedHTTPS(urllib.request.HTTPSHandler):
    """The same of https://."""

    def https_open(self, req: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, req)
