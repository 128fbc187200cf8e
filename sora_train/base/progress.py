"""How far a long piece of work has come: a live bar on a terminal, plain lines in a log file."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from sora_train.base.console import plain_console

LINE_SECONDS = 10.0  # a log file gets at most one line in this time, besides the first and the last


class Progress:
    """`with Progress(1000, "train") as bar: bar.update(step, loss=0.5)`; `step` counts finished steps.

    `enabled=False` (every rank but the first) prints nothing.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        start: int = 0,
        enabled: bool = True,
        file: TextIO | None = None,
        line_seconds: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total = total
        self.description = description
        self.enabled = enabled
        self._file = file or sys.stdout
        self._line_seconds = line_seconds
        self._clock = clock
        self._start = start
        self._step = start
        self._fields: dict[str, object] = {}
        self._first: tuple[float, int] | None = None
        self._last_line = float("-inf")
        self._line_step: int | None = None
        self._bar: RichProgress | None = None

    def __enter__(self) -> Self:
        if self.enabled and self._file.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[tail]}", markup=False),
                console=plain_console(file=self._file),
            )
            self._task = self._bar.add_task(
                self.description, total=self.total, completed=self._start, tail=""
            )
            self._bar.start()
        return self

    def update(self, step: int, **fields: object) -> None:
        """Show that `step` steps are done, with `fields`: floats get four digits, strings stay as they are."""
        now = self._clock()
        self._step, self._fields = step, fields
        if self._first is None:
            # The rate leaves out all before the end of the first step: compilation, warm caches.
            self._first = (now, step)
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, tail=self._tail(now))
        elif now - self._last_line >= self._line_seconds or step >= self.total:
            self._print_line(now)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.enabled and self._first is not None and self._line_step != self._step:
            self._print_line(self._clock())

    def eta(self, now: float) -> float | None:
        """Seconds left at the mean pace since the first update; None while unknown."""
        if self._first is None or self._step <= self._first[1]:
            return None
        pace = (now - self._first[0]) / (self._step - self._first[1])
        return pace * max(0, self.total - self._step)

    def _tail(self, now: float) -> str:
        eta = self.eta(now)
        parts = [f"{name} {_show(value)}" for name, value in self._fields.items()]
        return "  ".join([f"ETA {'--' if eta is None else duration(eta)}", *parts])

    def _print_line(self, now: float) -> None:
        line = f"{self.description} {self._step}/{self.total}  {self._tail(now)}"
        print(line, file=self._file, flush=True)
        self._last_line, self._line_step = now, self._step


def _show(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """`45 s`, `3:07 min`, `2:05 h`, `4 d 3 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
