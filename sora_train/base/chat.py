"""One request to an OpenAI-compatible endpoint, mostly for chat completions; what went wrong ends a sentence."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from sora_train.base.text import printable
from sora_train.base.timed import TimedHTTP, TimedHTTPS
from sora_train.errors import UserError

MOST_BYTES = 1 << 20
SHOWN = 160
"""Characters of an answer that a sentence quotes."""
_AGAIN = {408, 409, 425, 429}
_DENIED = {401, 403, 404, 405}


class Failed(Exception):
    """A try that failed; another may succeed unless `again` is false, after `wait` seconds at the earliest."""

    def __init__(self, problem: str, again: bool = True, wait: float = 0.0):
        super().__init__(problem)
        self.again, self.wait = again, wait


class Denied(Exception):
    """The address, the model or the key is wrong, so that no other request would fare better."""

    def __init__(self, status: str, code: int):
        super().__init__(status)
        self.is_key = code in (401, 403)


@dataclass(frozen=True)
class Completion:
    """What a model answered."""

    text: str
    refusal: str
    """Why it did not, in its words."""
    is_cut: bool
    """Whether it was stopped at its most tokens."""
    usage: Any


def complete(address: str, body: dict[str, Any], key: str, seconds: float) -> Completion:
    """The answer of `address`/chat/completions. Raises Failed and Denied."""
    return _completion(answered(f"{address}/chat/completions", body, key, seconds))


def answered(url: str, body: dict[str, Any], key: str, seconds: float) -> bytes:
    """What an address of an endpoint answers to a body of JSON. Raises Failed and Denied."""
    began = time.monotonic()
    try:
        with opened(url, json.dumps(body).encode(), key, seconds) as one:
            return _read(one, began + seconds)
    except urllib.error.HTTPError as error:
        if error.code in _DENIED:
            raise Denied(status(error), error.code) from None
        again = error.code in _AGAIN or error.code >= 500
        wait = _retry_after(error.headers.get("Retry-After", ""))
        raise Failed(f"the endpoint answers {status(error)}", again, wait) from None
    except TimeoutError:
        raise Failed(f"the endpoint does not answer within {seconds:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):
            raise Failed(f"the endpoint does not answer within {seconds:g} s") from None
        raise Failed(f"the endpoint cannot be reached: {why(error)}") from None


def opened(url: str, body: bytes | None, key: str, seconds: float) -> Any:
    """The response of an address, whole within `seconds`; `body` is JSON. Raises what urllib does."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    opener = urllib.request.build_opener(TimedHTTP, TimedHTTPS)
    return opener.open(urllib.request.Request(url, body, headers), timeout=seconds)


def key_in(variable: str, name: str) -> str:
    """The key that an environment variable holds; '' without a variable. Raises UserError, which begins with `name`,
    where it holds none."""
    if not variable:
        return ""
    if not (key := os.environ.get(variable, "").strip()):
        raise UserError(f"{name} is not set in the environment; export the endpoint's key in it")
    if not key.isascii() or not key.isprintable():
        raise UserError(f"{name} holds what no key does, such as a line end; set it anew")
    return key


def status(error: urllib.error.HTTPError) -> str:
    """`429 Too Many Requests: slow down`, with the beginning of what it wrote."""
    try:
        words = " ".join(error.read(4096).decode(errors="replace").split())
    except (OSError, http.client.HTTPException):
        words = ""
    return printable(f"{error.code} {error.reason}" + (f": {words:.{SHOWN}}" if words else ""))


def why(error: BaseException) -> str:
    """What kept a connection from being made, in a few words."""
    reason = getattr(error, "reason", None) or error
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__


def _read(response: Any, deadline: float) -> bytes:
    """The body of an answer. Raises TimeoutError for one that drips in, Failed for one that does not end."""
    data = b""
    while piece := response.read1(1 << 16):
        data += piece
        if len(data) > MOST_BYTES:
            raise Failed(f"the endpoint answers more than {MOST_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return data


def _completion(data: bytes) -> Completion:
    try:
        answer = json.loads(data)
        choice = answer["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        finish = choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        shown = printable(data.decode(errors="replace"))
        raise Failed(f"the endpoint answers no chat completion: {shown!r:.{SHOWN}}") from None
    if finish == "content_filter":
        refusal = refusal or "its content filter"
    said = text if isinstance(text, str) else ""
    return Completion(said, str(refusal or ""), finish == "length", answer.get("usage"))


def _retry_after(text: str) -> float:
    """Seconds of a header `Retry-After`; a date is no reason to wait longer than the backoff."""
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0
