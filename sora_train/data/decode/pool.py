"""A pool of decode processes that can be killed: a clip that spins, aborts or overruns costs that clip only.

Each child belongs to one thread, which sends it a request, waits for the answer until the clip's
deadline, and replaces the child when it is late or dead. Signals and thread timeouts do not help
against native code that holds the interpreter lock; SIGKILL does.

Light requests, which take a child a few milliseconds, travel several in a message. All of them have
the deadline of one; where it passes or the child dies, each is asked for again alone, and only its
own fate counts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import sora_train
from sora_train.data.decode import pipe
from sora_train.data.sample import Failure
from sora_train.errors import Fault

START_SECONDS = 120.0
EXIT_SECONDS = 5.0
MAX_START_FAILURES = 3
# The signal on which a decode process writes its stack, and the time it gets for that.
STACK_SIGNAL = signal.SIGUSR2
STACK_SECONDS = 0.3
# A read that takes longer than its deadline and this counts as stuck.
READ_GRACE = 10.0
# Of light requests: enough that what a message costs is little beside them.
MOST_IN_A_MESSAGE = 8

_Answer = tuple[str, Any]
_Item = tuple[Any, float, Future, Callable[[Any], Any] | None]
_WORKER = "sora_train.data.decode.worker"


def worker_of(backend: str) -> str:
    """The program that decodes with a backend."""
    return "sora_train.data.decode.torchcodec_worker" if backend == "torchcodec" else _WORKER


class _Child:
    """One decode process, started by the first request it gets."""

    def __init__(self, module: str):
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: Any = None
        self._stack_begin = 0
        self.stopping = False

    def start(self) -> None:
        if self._process is not None:
            return
        root = str(Path(sora_train.__path__[0]).resolve().parent)
        env = dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH", "")]))
        # -P: the directory the run was started in must not shadow a module of the child's.
        command = [sys.executable, "-P", "-m", self._module]
        for _ in range(MAX_START_FAILURES):
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill()
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=env
            )
            try:
                pipe.receive(self._process.stdout.fileno(), START_SECONDS)  # type: ignore[union-attr]
                return
            except (pipe.Closed, pipe.DeadlinePassed):
                message = self.kill()
        raise Fault(
            f"the process `{' '.join(command)}` does not start: {message or 'it wrote no error'}"
        )

    def ask(self, timeout: float, requests: Sequence[Any]) -> list[_Answer]:
        """The child's answers, or its end: ('late', detail), ('died', detail).

        A death is blamed on the clip only where it repeats: the machine may have run out of memory.
        """
        answers = self._ask_once(timeout, requests)
        if isinstance(answers, list):
            return answers
        if self.stopping or (len(requests) == 1 and answers[0] != "died"):
            return [answers] * len(requests)
        if len(requests) > 1:
            return [self.ask(timeout, [request])[0] for request in requests]
        again = self._ask_once(timeout, requests)
        return again if isinstance(again, list) else [again]

    def _ask_once(self, timeout: float, requests: Sequence[Any]) -> list[_Answer] | _Answer:
        """An answer for each request, or one for all where the child ended or storage failed."""
        self.start()
        assert self._process is not None and self._process.stdin and self._process.stdout
        try:
            pipe.send(self._process.stdin.fileno(), (timeout, requests))
            reading = getattr(requests[0], "reading", None)
            if reading is not None:
                # The clip's own deadline begins when its bytes are there.
                first = self._wait_for_bytes(reading.deadline + READ_GRACE)
                if first != pipe.FETCHED:
                    return first
            return pipe.receive(self._process.stdout.fileno(), timeout)
        except pipe.DeadlinePassed:
            self.kill()
            return "late", f"no answer within {timeout:g} s"
        except pipe.Closed:
            try:
                code: int | str = self._process.wait(timeout=EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                code = "unknown (it closed its pipe and went on)"
            message = self.kill()
            return "died", f"the decode process ended with code {code} {message}".strip()

    def _wait_for_bytes(self, timeout: float) -> Any:
        """`pipe.FETCHED`, or the answer where reading failed: its lateness is a fault of storage."""
        assert self._process is not None and self._process.stdout
        try:
            return pipe.receive(self._process.stdout.fileno(), timeout)
        except pipe.DeadlinePassed:
            self.kill()
            return "storage", f"its bytes did not come within {timeout:g} s"

    def kill(self) -> str:
        """End the process; the last line it wrote to stderr."""
        if self._process is None:
            return ""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                stream.close()
        self._process = None
        with self._errors:
            size = self._errors.seek(0, os.SEEK_END)
            self._errors.seek(max(0, size - 2000))
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""

    def ask_for_stack(self) -> None:
        """Have the process write its stack behind what it wrote to stderr before."""
        process, errors = self._process, self._errors
        if process is None or errors is None:
            return
        try:
            self._stack_begin = os.fstat(errors.fileno()).st_size
            process.send_signal(STACK_SIGNAL)
        except (OSError, ValueError):
            # The process ended or was replaced meanwhile.
            self._stack_begin = 0

    def stack(self) -> str:
        """What the process has written since `ask_for_stack`."""
        process, errors = self._process, self._errors
        if process is None or errors is None:
            return ""
        try:
            size = os.fstat(errors.fileno()).st_size - self._stack_begin
            text = os.pread(errors.fileno(), min(1 << 16, size), self._stack_begin)
        except (OSError, ValueError):
            return ""
        return f"decode process {process.pid}:\n{text.decode(errors='replace')}\n"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None


class DecodePool:
    """`num_workers` decode processes behind `submit`. Close it, or use it as a context manager.

    A future's result is the answer to the request, or a Failure (`unreadable`, `too_few_frames`,
    `decode_timeout`, `decoder_crashed`). Storage errors raise Fault from `Future.result`.
    """

    def __init__(self, num_workers: int, timeout: float, *, module: str = _WORKER):
        self.timeout = timeout
        self._items: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._children = [_Child(module) for _ in range(num_workers)]
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, args=(child,), daemon=True, name=f"decode-{index}")
            for index, child in enumerate(self._children)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        request: Any,
        timeout: float | None = None,
        convert: Callable[[Any], Any] | None = None,
    ) -> Future:
        """Queue a request with its own deadline in seconds (default: the pool's), counted from its start.

        `convert` turns the answer into the future's result.
        """
        if self._closed:
            raise Fault("the decode pool was used after it was closed")
        future: Future = Future()
        with self._changed:
            self._items.append((request, timeout or self.timeout, future, convert))
            self._changed.notify()
        return future

    @property
    def alive(self) -> bool:
        """Whether requests are still answered."""
        return not self._closed and all(thread.is_alive() for thread in self._threads)

    def stacks(self) -> str:
        """The stack of every process from its own fault handler, which works even inside native code."""
        for child in self._children:
            child.ask_for_stack()
        time.sleep(STACK_SECONDS)
        return "".join(child.stack() for child in self._children)

    @property
    def pids(self) -> list[int]:
        """The processes alive now."""
        return [child.pid for child in self._children if child.pid is not None]

    def close(self) -> None:
        """End the processes at once and cancel queued requests."""
        if self._closed:
            return
        with self._changed:
            self._closed = True
            while self._items:
                self._items.popleft()[2].cancel()
            self._changed.notify_all()
        for child in self._children:
            child.stopping = True
        for thread, child in zip(self._threads, self._children, strict=True):
            while thread.is_alive():
                # Repeated, as a child may just have been started.
                pid = child.pid
                if pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                thread.join(timeout=0.05)

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, child: _Child) -> None:
        while self._serve_one(child):
            pass
        child.kill()

    def _serve_one(self, child: _Child) -> bool:
        """Answer the next requests; False where the pool is closed. The clips are freed on return."""
        items = self._take()
        if not items:
            return False
        items = [item for item in items if item[2].set_running_or_notify_cancel()]
        try:
            requests = [item[0] for item in items]
            answers = child.ask(items[0][1], requests) if items else []
            if self._closed:
                raise Fault("the decode pool was closed while a clip was being decoded")
        # Without a result the waiting side would wait for ever.
        except BaseException as error:
            for item in items:
                item[2].set_exception(error)
            return True
        for item, answer in zip(items, answers, strict=True):
            _settle(item, answer)
        return True

    def _take(self) -> list[_Item]:
        """The next requests that go in one message, no more than a child's share; [] where the pool is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            share = min(MOST_IN_A_MESSAGE, len(self._items) // len(self._children))
            taken: list[_Item] = []
            while self._items and (
                not taken or (len(taken) < share and _go_together(taken[0], self._items[0]))
            ):
                taken.append(self._items.popleft())
            return taken


def _go_together(first: _Item, other: _Item) -> bool:
    """Whether both are light and have the same deadline."""
    return first[1] == other[1] and all(
        getattr(item[0], "is_light", False) for item in (first, other)
    )


def _settle(item: _Item, answer: _Answer) -> None:
    """Give an item's future its result."""
    request, _, future, convert = item
    try:
        result = _interpret(request, *answer)
        future.set_result(convert(result) if convert else result)
    # As above.
    except BaseException as error:
        future.set_exception(error)


def _interpret(request: Any, status: str, value: Any) -> Any:
    """The value of an answer, or a Failure. Raises Fault where storage fails."""
    if status == "ok":
        return value
    if status == "storage":
        raise Fault(
            f"cannot read the clip {request.key!r} at byte {request.offset}: {value}; check the storage, "
            "or index the source again if its files changed"
        )
    if status == "bad":
        return Failure(request.row, *value)
    reasons = {"late": "decode_timeout", "died": "decoder_crashed"}
    return Failure(request.row, reasons[status], value)
