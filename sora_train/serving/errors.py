"""What the API refuses and why, in the shape that OpenAI's clients read.

Clients try 408, 409, 429 and 5xx again by themselves, so what will not change by waiting says `x-should-retry: false`.
"""

from typing import Any


class ApiError(Exception):
    """A request that is answered with an error; `message` is for the caller and names nothing of the inside."""

    status = 500
    type = "server_error"
    code = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.param = message, param
        self.code = code if code is not None else self.code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


class BadRequest(ApiError):
    """The request cannot be served as it stands; `param` is the field to change."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"

    def __init__(self, param: str | None, message: str, code: str | None = None):
        super().__init__(message, param=param, code=code)


class Unauthorized(ApiError):
    """No key, or one that is unknown, revoked or expired."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def __init__(self, message: str):
        super().__init__(message, headers={"www-authenticate": "Bearer"})


class Forbidden(ApiError):
    """A caller who may not do this at all."""

    status = 403
    type = "invalid_request_error"
    code = "forbidden"


class NotFound(ApiError):
    """Nothing here for this caller: what belongs to others is not found either."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


class NotAllowed(ApiError):
    """The path is known, the method is not."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class Conflict(ApiError):
    """An idempotency key that stands for another request."""

    status = 409
    type = "invalid_request_error"
    code = "idempotency_conflict"

    def __init__(self, message: str):
        super().__init__(message, headers={"x-should-retry": "false"})


class TooLarge(ApiError):
    """A body, or a part of it, over its limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class TooManyRequests(ApiError):
    """A limit of the key; `retry_after` seconds where waiting helps."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: float | None = None, code: str | None = None):
        again = (
            {"x-should-retry": "false"}
            if retry_after is None
            else {
                "retry-after": str(max(1, round(retry_after))),
                "retry-after-ms": str(max(1, round(retry_after * 1000))),
            }
        )
        super().__init__(message, code=code, headers=again)


class Unavailable(ApiError):
    """The database, the storage or a backend is away; nothing was accepted, so the same request may come again."""

    status = 503
    type = "server_error"
    code = "unavailable"

    def __init__(self, message: str, *, retry_after: float = 1.0):
        super().__init__(message, headers={"retry-after": str(max(1, round(retry_after)))})
