"""A vision model behind an OpenAI-compatible endpoint for chat completions."""

from __future__ import annotations

import base64
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from data_prep.captioning.asking import Failed, Reply
from data_prep.captioning.schema import prompt, schema
from data_prep.captioning.settings import CaptionConfig
from sora_train.base.text import printable
from sora_train.errors import UserError

MOST_BYTES = 1 << 20
CHECK_SECONDS = 10.0
_AGAIN = {408, 409, 425, 429}
_DENIED = {401, 403, 404, 405}
_SHOWN = 160


def check_endpoint(settings: CaptionConfig) -> None:
    """Raises UserError where the settings or the key are incomplete, or the endpoint cannot be reached."""
    for name in ("endpoint", "model"):
        if not getattr(settings, name):
            raise UserError(f"caption.by=endpoint needs caption.{name}; give it")
    if settings.max_cost and not (settings.price_in or settings.price_out):
        raise UserError(
            f"caption.max_cost={settings.max_cost:g} needs prices; give caption.price_in and caption.price_out"
        )
    _key(settings)
    try:
        with _opened(settings, "/models", None, CHECK_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise _denied(settings, error) from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"caption.endpoint={settings.endpoint} cannot be reached: {_why(error)}; start it, or correct the address"
        ) from None


def ask_endpoint(settings: CaptionConfig, frames: Sequence[bytes], attempt: int) -> Reply:
    """The model's answer about frames (JPEG). Raises Failed, and UserError where no other clip would fare better."""
    body = json.dumps(request_of(settings, frames, attempt)).encode()
    began = time.monotonic()
    try:
        with _opened(settings, "/chat/completions", body, settings.timeout) as response:
            data = _read(response, began + settings.timeout)
    except urllib.error.HTTPError as error:
        if error.code in _DENIED:
            raise _denied(settings, error) from None
        again = error.code in _AGAIN or error.code >= 500
        wait = _retry_after(error.headers.get("Retry-After", ""))
        raise Failed(f"the endpoint answers {_status(error)}", again, wait) from None
    except TimeoutError:
        raise Failed(f"the endpoint does not answer within {settings.timeout:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):
            raise Failed(f"the endpoint does not answer within {settings.timeout:g} s") from None
        raise Failed(f"the endpoint cannot be reached: {_why(error)}") from None
    return _reply(settings, data)


def request_of(settings: CaptionConfig, frames: Sequence[bytes], attempt: int) -> dict[str, Any]:
    """The body of a request; every try has a seed of its own, so that it may fare better than the last."""
    pictures = [
        {
            "type": "image_url",
            "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(frame).decode()},
        }
        for frame in frames
    ]
    body: dict[str, Any] = {
        "model": settings.model,
        "messages": [
            {"role": "user", "content": [*pictures, {"type": "text", "text": prompt(settings)}]}
        ],
        "max_tokens": settings.max_answer_tokens,
        "temperature": 0.2,
        "seed": attempt,
    }
    if settings.structured:
        named = {"name": "description", "strict": True, "schema": schema()}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    return body | settings.request


def _opened(settings: CaptionConfig, path: str, body: bytes | None, seconds: float) -> Any:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key := _key(settings):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(settings.endpoint + path, body, headers)
    return urllib.request.urlopen(request, timeout=seconds)


def _key(settings: CaptionConfig) -> str:
    if not settings.api_key_env:
        return ""
    if not (key := os.environ.get(settings.api_key_env, "").strip()):
        raise UserError(
            f"caption.api_key_env={settings.api_key_env} is not set in the environment; export the endpoint's key in it"
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(
            f"caption.api_key_env={settings.api_key_env} holds what no key does, such as a line end; set it anew"
        )
    return key


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


def _reply(settings: CaptionConfig, data: bytes) -> Reply:
    """The text and the tokens of a chat completion."""
    try:
        answer = json.loads(data)
        choice = answer["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        shown = printable(data.decode(errors="replace"))
        raise Failed(f"the endpoint answers no chat completion: {shown!r:.{_SHOWN}}") from None
    sent, answered = _tokens(settings, answer.get("usage"))
    if refusal or choice.get("finish_reason") == "content_filter":
        problem = f"refuses: {refusal or 'its content filter'!r:.{_SHOWN}}"
    elif choice.get("finish_reason") == "length":
        problem = (
            f"is cut off at caption.max_answer_tokens={settings.max_answer_tokens} tokens; raise it"
        )
    else:
        problem = ""
    return Reply(text if isinstance(text, str) else "", sent, answered, problem)


def _tokens(settings: CaptionConfig, usage: Any) -> tuple[int, int]:
    try:
        return max(0, int(usage["prompt_tokens"])), max(0, int(usage["completion_tokens"]))
    except (KeyError, TypeError, ValueError):
        if settings.has_budget:
            raise UserError(
                f"caption.endpoint={settings.endpoint} does not tell how many tokens it used, so no budget can be "
                "kept; set caption.max_tokens_total=0 and caption.max_cost=0"
            ) from None
        return 0, 0


def _denied(settings: CaptionConfig, error: urllib.error.HTTPError) -> UserError:
    remedy = (
        "correct the key in the variable that caption.api_key_env names"
        if error.code in (401, 403)
        else "correct caption.endpoint or caption.model"
    )
    return UserError(f"caption.endpoint={settings.endpoint} answers {_status(error)}; {remedy}")


def _status(error: urllib.error.HTTPError) -> str:
    """`429 Too Many Requests: slow down`, with the beginning of what it wrote."""
    try:
        words = " ".join(error.read(4096).decode(errors="replace").split())
    except (OSError, http.client.HTTPException):
        words = ""
    return printable(f"{error.code} {error.reason}" + (f": {words:.{_SHOWN}}" if words else ""))


def _retry_after(text: str) -> float:
    """Seconds of a header `Retry-After`; a date is no reason to wait longer than the backoff."""
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0


def _why(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
