"""Preemption: SIGTERM, SIGUSR1, or a time limit that comes near.

The signal handler only records the signal. The run asks in all its loops, saves a checkpoint and ends. Time is
measured from the start of the process with a monotonic clock, so setting the system clock changes nothing.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

SLURM_END = "SLURM_JOB_END_TIME"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: list[str] = []


def record_signal(number: int, _frame: FrameType | None) -> None:
    """The signal handler."""
    _received.append(signal.Signals(number).name)


@contextmanager
def listening() -> Iterator[None]:
    """Inside the block these signals are recorded and do not end the process.

    Python handles signals in the main thread only; in any other thread the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received.clear()
    before = {number: signal.signal(number, record_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def pending() -> bool:
    """Whether this process received such a signal. For loops that run before there is a control plane."""
    return bool(_received)


class PreemptionNotice:
    """What this rank knows: `signalled` names the signal, `late` says that the time is nearly up."""

    def __init__(
        self,
        time_limit_minutes: float,
        leave_seconds: float,
        environ: Mapping[str, str] = os.environ,
    ):
        limits = [time_limit_minutes * 60] if time_limit_minutes else []
        if environ.get(SLURM_END, "").isdigit():
            limits.append(int(environ[SLURM_END]) - time.time())
        self._began = time.monotonic()
        self._limit = min(limits) - leave_seconds if limits else None

    @property
    def signalled(self) -> str:
        """The first signal received, or an empty string."""
        return _received[0] if _received else ""

    @property
    def late(self) -> bool:
        return self._limit is not None and time.monotonic() - self._began > self._limit
