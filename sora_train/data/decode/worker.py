"""A child process that decodes: requests come on stdin, answers leave on stdout, one at a time.

It is a program of its own (`python -m sora_train.data.decode.worker`), so that a user's main module
is never imported again, no lock is inherited from a forked parent, and torch is never loaded
(but in `decode_torchcodec_worker`, which serves that decoder alone).
"""

import ctypes
import dataclasses
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import numpy as np  # noqa: E402 - the threads above must be set before it loads

from sora_train.data.decode import frames as decode  # noqa: E402 - the threads above must be set before numpy loads
from sora_train.data.decode import pipe, probe  # noqa: E402 - the threads above must be set before numpy loads
from sora_train.data.storage import cached_reads as reading  # noqa: E402 - the threads above must be set before numpy loads
from sora_train.data.storage.ranges import StorageFault  # noqa: E402 - the threads above must be set before numpy loads

PARENT_DEATH_SIGNAL = 1
# Seconds beyond the parent's deadline: the alarm ends a child that spins in native code after its parent died.
ALARM_GRACE = 30
TEST_HOOK = "SORA_TEST_DECODE"


def answer(request: probe.ProbeRequest | decode.DecodeRequest) -> tuple[str, object]:
    """('ok', Probe or frames), ('bad', (reason, detail)) or ('storage', detail)."""
    return guarded(lambda: _answer(request))


def _answer(request: probe.ProbeRequest | decode.DecodeRequest) -> object:
    if isinstance(request, probe.ProbeRequest):
        return probe.probe_video(request)
    if isinstance(request, decode.TimedRequest):
        began = time.process_time()
        frames = _decoded(request)
        return time.process_time() - began, frames
    return _decoded(request)


def _decoded(request: decode.DecodeRequest) -> np.ndarray:
    if request.backend == "decord" and request.kind == "video":
        from sora_train.data.decode import decord as decode_decord

        return decode_decord.decode_frames(request)
    if request.backend == "torchcodec" and request.kind == "video":
        from sora_train.data.decode import torchcodec as decode_torchcodec

        return decode_torchcodec.decode_frames(request)
    return decode.decode_frames(request)


def guarded(work: Callable[[], object]) -> tuple[str, object]:
    """The answer ('ok', `work()`), or ('bad', ...) or ('storage', ...) where it fails."""
    try:
        return "ok", work()
    except decode.BadClip as error:
        return "bad", (error.reason, error.detail)
    except StorageFault as error:
        return "storage", str(error)
    # Libraries raise any exception on a damaged file, so all others count as the file's fault.
    except Exception as error:
        return "bad", ("unreadable", f"{type(error).__name__}: {decode.in_words(error)}")


def misbehave(key: str) -> None:
    """Spin or abort on the clip that a test names in the environment, as a native decoder might."""
    action, _, target = os.environ.get(TEST_HOOK, "").partition("=")
    if not action or target not in key:
        return
    if action == "abort":
        os.abort()
    if action == "spin":
        import re

        re.match(r"(a|a)+$", "a" * 64 + "b")  # holds the GIL in C, practically for ever


def die_with_parent() -> None:
    """A child that spins never sees its stdin close, so ask the kernel."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)


def leave_real_time() -> None:
    """Take the scheduling of ordinary programs: in real time a clip that spins would starve all else on its core.

    The parent may be a real-time process without knowing: SVT-AV1 makes the thread one that encodes with it as root.
    """
    if sys.platform == "linux" and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def fetch(request: Any) -> tuple[Any, tuple[str, object] | None]:
    """The request with its bytes and None; or the request and the answer, where storage fails."""
    try:
        data = reading.read_range(
            request.path,
            request.offset,
            request.length,
            request.reading,
            digest=request.digest,
            stamp=request.stamp,
        )
    except StorageFault as error:
        return request, ("storage", str(error))
    except MemoryError as error:
        return request, ("storage", f"out of memory: {error}")
    return dataclasses.replace(request, data=data), None


def serve(answer: Callable[[Any], tuple[str, object]]) -> None:
    """Answer messages (deadline in seconds, requests with a `key` each) until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leave_real_time()
    # The run handles these signals and ends its decode processes itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2)
    die_with_parent()
    requests, answers = os.dup(0), os.dup(1)
    # Output of libraries must not mix with the answers.
    os.dup2(2, 1)
    pipe.widen(answers)
    pipe.send(answers, "ready")
    while True:
        try:
            timeout, asked = pipe.receive(requests)
            pipe.send(answers, _replies(answer, timeout, asked, answers))
        except pipe.Closed:
            return


def _replies(
    answer: Callable[[Any], tuple[str, object]], timeout: float, asked: list[Any], answers: int
) -> list[tuple[str, object]]:
    """The answers to the requests of a message, within `timeout` seconds after their bytes are there."""
    replies = []
    if getattr(asked[0], "reading", None) is not None:
        signal.alarm(int(asked[0].reading.deadline) + ALARM_GRACE)
        request, failure = fetch(asked[0])
        if failure is not None:
            return [failure]
        # From here on the clip's own deadline counts.
        pipe.send(answers, pipe.FETCHED)
        asked = [request]
    signal.alarm(int(timeout) + ALARM_GRACE)
    for request in asked:
        misbehave(request.key)
        replies.append(answer(request))
    signal.alarm(0)
    return replies


if __name__ == "__main__":
    serve(answer)
