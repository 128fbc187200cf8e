"""Runs of a sweep on this machine, each a process of its own: one that fails stops no other; and how it all ended."""

import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from sora_train.config import Config
from sora_train.config.sections.launch import LaunchConfig
from sora_train.errors import EXIT_FAULT, EXIT_INTERRUPTED, EXIT_REQUEUE, ConfigError, UserError
from sora_train.monitoring.status import read_status
from sora_train.tools.sweep.axes import SweepRun
from sora_train.tools.sweep.folder import Sweep
from sora_train.tools.sweep.template import Template

LOG = "sweep.log"
"""In a run's folder: its output, where several run side by side."""
LEFT = (EXIT_REQUEUE, EXIT_INTERRUPTED, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of a run that was asked to leave, and with it the sweep."""


@dataclass(frozen=True)
class Task:
    """A run to be started, and where its output goes; None: to the terminal."""

    run: SweepRun
    command: list[str]
    log: Path | None = None


class Runner:
    """Starts up to `at_once` runs side by side, and passes on the signals that the sweep gets.

    Use it as a context: signals are its own inside. `stopping` is set once a run was asked to leave; none is started
    from then on.
    """

    def __init__(self, at_once: int, launch: LaunchConfig):
        self.at_once = at_once
        self.stopping = False
        self._live: set[subprocess.Popen[bytes]] = set()
        self._slots: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for variables in shares(at_once, launch):
            self._slots.put(variables)
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Runner":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def results(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, int]]:
        """Each task with its exit code, as they end. The next is drawn from `tasks` only when there is room for it."""
        if self.at_once == 1:
            for task in tasks:
                code = self.run(task)
                self.stopping = self.stopping or code in LEFT
                yield task, code
                if self.stopping:
                    return
        else:
            yield from self._side_by_side(iter(tasks))

    def _side_by_side(self, tasks: Iterator[Task]) -> Iterator[tuple[Task, int]]:
        with ThreadPoolExecutor(self.at_once) as pool:
            running: dict[Future[int], Task] = {}
            while True:
                while len(running) < self.at_once and not self.stopping:
                    task = next(tasks, None)
                    if task is None:
                        break
                    running[pool.submit(self.run, task)] = task
                if not running:
                    return
                for future in self._ended(running):
                    code = future.result()
                    self.stopping = self.stopping or code in LEFT
                    yield running.pop(future), code

    def _ended(self, running: Iterable[Future[int]]) -> set[Future[int]]:
        try:
            return wait(running, return_when=FIRST_COMPLETED).done
        except KeyboardInterrupt:
            # The terminal has interrupted the runs too; each leaves by itself.
            self.stopping = True
            return wait(running, return_when=FIRST_COMPLETED).done

    def run(self, task: Task) -> int:
        """Run it to its end; returns the exit code, negative for a signal."""
        variables = self._slots.get()
        try:
            return self.in_process(task, os.environ | variables)
        finally:
            self._slots.put(variables)

    def in_process(self, task: Task, environ: dict[str, str]) -> int:
        if task.log is None:
            return self._waited(subprocess.Popen(task.command, env=environ))
        task.log.parent.mkdir(parents=True, exist_ok=True)
        with task.log.open("ab") as log:
            return self._waited(
                subprocess.Popen(task.command, env=environ, stdout=log, stderr=subprocess.STDOUT)
            )

    def _waited(self, process: "subprocess.Popen[bytes]") -> int:
        self._live.add(process)
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The terminal has interrupted the run too; it saves and leaves by itself.
            self.stopping = True
            return process.wait()
        finally:
            self._live.discard(process)

    def stop(self) -> None:
        """Ask the runs to save and leave, and start no other."""
        self._pass_on(signal.SIGTERM, None)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.stopping = True
        for process in [*self._live]:
            process.send_signal(number)


def started_task(
    template: Template, sweep: Sweep, run: SweepRun, config: Config, at_once: int, place: str
) -> Task:
    log = sweep.folder / run.id / LOG if at_once > 1 else None
    print(f"run {place}: {run.id}{f' (its output: {log})' if log else ''}", flush=True)
    return Task(run, template.command(run, sweep.folder, config), log)


def report_outcome(sweep: Sweep, outcome: dict[str, int], *, stopped: bool) -> int:
    """Print how the sweep ended; returns its exit code."""
    failed = {id: code for id, code in outcome.items() if code}
    print(
        f"{len(outcome) - len(failed)} of {len(outcome)} runs succeeded; they are under {sweep.folder}"
    )
    if stopped:
        print("the sweep was asked to leave; the same command goes on with it", file=sys.stderr)
        return EXIT_REQUEUE
    for id, code in failed.items():
        print(
            f"failed: {id} (exit code {code}){failure_reason(sweep.folder / id)}", file=sys.stderr
        )
    if failed:
        print("the same command again runs only what is not finished", file=sys.stderr)
    elif outcome:
        print(f"next: sora sweep report {shlex.quote(str(sweep.folder))}")
    return EXIT_FAULT if failed else 0


def failure_reason(run_dir: Path) -> str:
    """Why a run failed, as far as its folder knows, as the end of a sentence."""
    try:
        status = read_status(run_dir)
    except UserError:
        return ""
    return f": {status.why}" if status.state in ("failed", "silent") else ""


def shares(at_once: int, launch: LaunchConfig) -> list[dict[str, str]]:
    """Environment variables of each of so many runs side by side: the GPUs of this machine, shared out.

    Raises ConfigError where they have too few.
    """
    gpus = visible_gpus()
    if at_once == 1 or not gpus:
        return [{} for _ in range(at_once)]
    each = len(gpus) // at_once
    if each < max(1, launch.ranks):
        raise ConfigError(
            f"sweep.at_once={at_once} runs of {max(1, launch.ranks)} rank(s) do not fit on {len(gpus)} GPU(s); lower "
            "sweep.at_once or launch.ranks"
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[slot * each : (slot + 1) * each])}
        for slot in range(at_once)
    ]


def visible_gpus() -> list[str]:
    """The GPUs that a process started here would see, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [part.strip() for part in named.split(",") if part.strip()]
    count = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return [str(number) for number in range(count)]
