"""Asking a model about a clip until its answer is a description, the tries are used up or the budget is spent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_prep.captioning.schema import Description, Rubbish, parsed
from data_prep.captioning.settings import CaptionConfig
from data_prep.captioning.spending import Spending, Usage
from data_prep.stage import Later
from sora_train.base.chat import Failed

# Clips that failed one after the other in a process, from which on each is tried once: the endpoint is down.
MANY_FAILED = 16


@dataclass(frozen=True)
class Reply:
    """What a model answered, and with how many tokens; `problem` is what it says of itself, such as a refusal."""

    text: str
    sent: int
    answered: int
    problem: str = ""


Ask = Callable[[CaptionConfig, Sequence[bytes], int], Reply]


class _InARow:
    """How many clips have failed one after the other, in all threads of the process."""

    def __init__(self) -> None:
        self.count, self._lock = 0, threading.Lock()

    def ended(self, well: bool) -> None:
        with self._lock:
            self.count = 0 if well else self.count + 1


_failed = _InARow()


def described(
    ask: Ask, settings: CaptionConfig, frames: Sequence[bytes], request: str, spending: Spending
) -> tuple[Description, Usage]:
    """The description of a clip's frames and what all tries of it have used.

    Waits `caption.backoff` seconds, twice that, and so on between tries, or as long as the endpoint asks for. Raises
    Later where all fail or the budget is spent.
    """
    used, tries = Usage(), 1 if _failed.count >= MANY_FAILED else settings.retries + 1
    for attempt in range(tries):
        spending.require_budget(settings)
        try:
            reply = ask(settings, frames, attempt)
            used += _paid(settings, reply, request, spending)
            description = _described(reply, settings)
            _failed.ended(well=True)
            return description, used
        except Failed as error:
            wait = max(error.wait, settings.backoff * 2**attempt)
            if not error.again or wait > settings.max_wait or attempt == tries - 1:
                _failed.ended(well=False)
                asks = f" and asks to wait {wait:g} s" if error.wait > settings.max_wait else ""
                raise Later(
                    "caption_failed", f"{error}{asks} ({attempt + 1} of {tries} tries)"
                ) from None
            time.sleep(wait)
    raise AssertionError("a try either returns or raises")


def _paid(settings: CaptionConfig, reply: Reply, request: str, spending: Spending) -> Usage:
    cost = (reply.sent * settings.price_in + reply.answered * settings.price_out) / 1e6
    usage = Usage(reply.sent, reply.answered, cost)
    if usage.tokens:
        spending.add(request, usage)
    return usage


def _described(reply: Reply, settings: CaptionConfig) -> Description:
    try:
        if reply.problem:
            raise Rubbish(reply.problem)
        return parsed(reply.text, settings)
    except Rubbish as error:
        raise Failed(f"the model {error}") from None
