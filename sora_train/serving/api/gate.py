"""Around every request: its id, the largest body, what is measured of it, and an answer whatever happens inside."""

import errno
import json
import logging
import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sora_train.errors import Fault
from sora_train.serving.errors import ApiError, BadRequest, Conflict, TooLarge, Unavailable
from sora_train.serving.jobs.job import DatabaseAway, KeyReused, UnknownJob

log = logging.getLogger(__name__)

Measured = Callable[[str, str, int, float], None]
"""Takes the route, the method, the status and the seconds of a request."""


def as_api_error(error: Exception) -> ApiError:
    """What a caller is told of a failure: nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, KeyReused):
        return Conflict("The Idempotency-Key stands for another request; give each its own.")
    if isinstance(error, UnknownJob):
        return BadRequest("after", "There is no video with this id.", "not_found")
    if isinstance(error, DatabaseAway):
        return Unavailable("The database does not answer; try again.")
    if isinstance(error, Fault):
        return Unavailable("The server's storage does not answer; try again.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Unavailable("The server's storage is full; try again later.", retry_after=60.0)
    return ApiError("The server failed; the log has the reason by this answer's x-request-id.")


class Gate:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, most_bytes: int, measured: Measured):
        self.app, self.most_bytes, self.measured = app, most_bytes, measured

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                ]
            await send(message)

        try:
            self._require_small(scope)
            await self.app(scope, self._counted(receive), answer)
        except Exception as error:
            told = as_api_error(error)
            if isinstance(error, Fault):  # while the database is away, every request says so
                log.error("%s failed: %s", request_id, error)
            elif told.status >= 500:
                log.error("%s failed", request_id, exc_info=error)
            if status:
                raise  # the answer has begun: only a broken connection says that it is not whole
            await _send_error(told, answer)
        finally:
            self.measured(_route(scope), scope["method"], status, time.perf_counter() - start)

    def _require_small(self, scope: Scope) -> None:
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said[:20]) > self.most_bytes:
            raise self._too_large()

    def _counted(self, receive: Receive) -> Receive:
        count = 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self.most_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> TooLarge:
        return TooLarge(f"A request may have {self.most_bytes} bytes.")


async def _send_error(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    pairs = [(name.encode(), text.encode()) for name, text in {**headers, **error.headers}.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _route(scope: Scope) -> str:
    """The path as the route has it, `/v1/videos/{video_id}`: few names, whatever is asked."""
    return getattr(scope.get("route"), "path", "other")
