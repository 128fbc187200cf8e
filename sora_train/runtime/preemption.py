"""Notices to leave: SIGTERM, SIGUSR1, or a time limit that comes near.

A handler does nothing but take note; the run asks in all its loops and leaves by its own road, with
a checkpoint. The clock counts from the start of the process, so that a clock that is set while a
run goes on hurries nobody.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

SLURM_END = "SLURM_JOB_END_TIME"
HEEDED = (signal.SIGTERM, signal.SIGUSR1)

_received: list[str] = []


def take_note(number: int, _frame: FrameType | None) -> None:
    """The signal handler."""
    _received.append(signal.Signals(number).name)


@contextmanager
def listening() -> Iterator[None]:
    """Inside the block a signal to leave is noted instead of ending the process at once.

    Elsewhere than in the main thread Python takes no signals, and the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _received.clear()
    before = {number: signal.signal(number, take_note) for number in HEEDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _received.clear()


def pending() -> bool:
    """Whether this process has been told to leave by a signal: for loops before a run has its control plane."""
    return bool(_received)


class Notices:
    """What this rank has been told: `signalled` names the signal, `late` says that time is nearly up."""

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
        """The first signal to leave, or an empty string."""
        return _received[0] if _received else ""

    @property
    def late(self) -> bool:
        return self._limit is not None and time.monotonic() - self._began > self._limit
