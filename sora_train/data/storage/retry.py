"""Reads that are retried with growing pauses, within a deadline; a lasting failure is a fault of storage."""

from __future__ import annotations

import http.client
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from sora_train.base.seeding import key_seed
from sora_train.data.storage.ranges import StorageFault

LONGEST_PAUSE_SECONDS = 10.0

T = TypeVar("T")


class NotRetryable(Exception):
    """A failure that no further attempt would change, as a file that does not exist."""


@dataclass(frozen=True)
class ReadPolicy:
    """How remote bytes are read: `retries` after the first attempt, each at most `timeout` seconds.

    `cache_dir` keeps at most `cache_bytes` of them, in blocks of `block_bytes` for shards with a known
    size and fingerprint. `first_pause` is the mean pause in seconds before the first retry; it doubles
    with each.
    """

    retries: int = 5
    timeout: float = 30.0
    cache_dir: str = ""
    cache_bytes: int = 0
    first_pause: float = 0.5
    block_bytes: int = 8 << 20

    def pause(self, attempt: int, *what: str | int) -> float:
        """Seconds to wait after a failed attempt (0: the first): keyed, and different for each read."""
        mean = min(LONGEST_PAUSE_SECONDS, self.first_pause * 2**attempt)
        return mean * (0.5 + key_seed(0, "read_pause", *what, attempt) / 2**63)

    @property
    def attempts_seconds(self) -> float:
        """The most seconds that one request may take with all its attempts and pauses."""
        pauses = (
            1.5 * min(LONGEST_PAUSE_SECONDS, self.first_pause * 2**attempt)
            for attempt in range(self.retries)
        )
        return (self.retries + 1) * self.timeout + sum(pauses)

    @property
    def deadline(self) -> float:
        """The most seconds that a read may take: another process may be fetching the same bytes first."""
        return self.attempts_seconds + (self.timeout if self.cache_dir else 0.0)


def retried(
    read: Callable[[], T], policy: ReadPolicy, what: str, *key: str | int, ends: float = math.inf
) -> T:
    """`read()`, retried by the policy, at the latest until `ends` (of `time.monotonic`).

    Raises StorageFault, which begins with `what`. The pauses are keyed by `key`.
    """
    began = time.monotonic()
    attempt = 0
    while True:
        try:
            return _within(min(policy.timeout, max(0.0, ends - time.monotonic())), read)
        except NotRetryable as error:
            message, final = str(error), True
        except TimeoutError:
            message, final = f"no whole answer within data.read_timeout={policy.timeout:g} s", False
        # Each protocol's client raises its own exceptions, and all of them may be temporary.
        except (OSError, http.client.HTTPException, RuntimeError, ValueError) as error:
            message, final = " ".join(str(error).split())[:200] or type(error).__name__, False
        attempt += 1
        if final or attempt > policy.retries or time.monotonic() >= ends:
            seconds = time.monotonic() - began
            raise StorageFault(
                f"{what}: {message} ({attempt} attempt{'s' * (attempt > 1)} in {seconds:.1f} s)"
            )
        time.sleep(policy.pause(attempt - 1, *key))


def _within(seconds: float, read: Callable[[], T]) -> T:
    """`read()`, given up after `seconds`: a name server or a slow trickle of bytes has no deadline of its own."""
    if seconds == math.inf:
        return read()
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(read())
        # Without a result the waiting side would wait for ever.
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True, name="read").start()
    return done.result(timeout=seconds)
