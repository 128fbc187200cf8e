"""A vision model behind an OpenAI-compatible endpoint for chat completions."""

from __future__ import annotations

import base64
import http.client
import urllib.error
from collections.abc import Sequence
from typing import Any

from data_prep.captioning.asking import Reply
from data_prep.captioning.schema import prompt, schema
from data_prep.captioning.settings import CaptionConfig
from sora_train.base.chat import SHOWN, Denied, complete, key_in, opened, status, why
from sora_train.errors import UserError

CHECK_SECONDS = 10.0


def check_endpoint(settings: CaptionConfig) -> None:
    """Raises UserError where the settings or the key are incomplete, or the endpoint cannot be reached."""
    for name in ("endpoint", "model"):
        if not getattr(settings, name):
            raise UserError(f"caption.by=endpoint needs caption.{name}; give it")
    if settings.max_cost and not (settings.price_in or settings.price_out):
        raise UserError(
            f"caption.max_cost={settings.max_cost:g} needs prices; give caption.price_in and caption.price_out"
        )
    key = _key(settings)
    try:
        with opened(f"{settings.endpoint}/models", None, key, CHECK_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise _denied(settings, Denied(status(error), error.code)) from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"caption.endpoint={settings.endpoint} cannot be reached: {why(error)}; start it, or correct the address"
        ) from None


def ask_endpoint(settings: CaptionConfig, frames: Sequence[bytes], attempt: int) -> Reply:
    """The model's answer about frames (JPEG). Raises Failed, and UserError where no other clip would fare better."""
    body = request_of(settings, frames, attempt)
    try:
        answer = complete(settings.endpoint, body, _key(settings), settings.timeout)
    except Denied as error:
        raise _denied(settings, error) from None
    sent, answered = _tokens(settings, answer.usage)
    problem = ""
    if answer.refusal:
        problem = f"refuses: {answer.refusal!r:.{SHOWN}}"
    elif answer.is_cut:
        problem = (
            f"is cut off at caption.max_answer_tokens={settings.max_answer_tokens} tokens; raise it"
        )
    return Reply(answer.text, sent, answered, problem)


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


def _key(settings: CaptionConfig) -> str:
    return key_in(settings.api_key_env, f"caption.api_key_env={settings.api_key_env}")


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


def _denied(settings: CaptionConfig, error: Denied) -> UserError:
    remedy = (
        "correct the key in the variable that caption.api_key_env names"
        if error.is_key
        else "correct caption.endpoint or caption.model"
    )
    return UserError(f"caption.endpoint={settings.endpoint} answers {error}; {remedy}")
