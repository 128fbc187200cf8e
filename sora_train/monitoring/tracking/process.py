"""Feeds trackers (W&B, TensorBoard) from the run folder, off the hot path.

A process for each tracker follows metrics.jsonl and the samples folder (tracking_feed.py) and sends
what appears. The files are the queue, so a slow tracker costs the run neither memory nor time: it may
hang, crash, write without end or be absent, and the files in the run folder stay complete. Only rank 0
has one; nothing here waits for another rank.
"""

import os
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from sora_train.config.sections.outputs import TrackerConfig

FOLDER = "trackers"
ID_FILE = "wandb_run_id"
POLL_SECONDS = 1.0
MAX_LOG_BYTES = 16 << 20
"""A tracker that writes more than this to its log is ended: it would fill the run's disk."""


def own_file(run_dir: Path, name: str) -> Path:
    """A file of the trackers' own in a run's folder."""
    return run_dir / FOLDER / name


def stop_file(run_dir: Path, kind: str) -> Path:
    """A run creates this file to ask the feeding process of a tracker to end."""
    return own_file(run_dir, f"{kind}.stop")


def notice_file(run_dir: Path, kind: str) -> Path:
    """A sentence of the feeding process that the run prints."""
    return own_file(run_dir, f"{kind}.notice")


def log_file(run_dir: Path, kind: str) -> Path:
    """What the feeding process prints."""
    return own_file(run_dir, f"{kind}.log")


class Trackers:
    """A run's trackers, which finish side by side; there may be none."""

    def __init__(self, trackers: Sequence["ProcessTracker"] = (), finish_seconds: float = 30.0):
        self.trackers = list(trackers)
        self.finish_seconds = finish_seconds

    def detach(self) -> None:
        """Ask them to end and do not wait: a preempted run has no time, and they end by themselves."""
        for tracker in self.trackers:
            tracker.ask_to_stop()
        self.trackers = []

    def finish(self) -> None:
        """Let them send what is left; returns within `finish_seconds` or little more."""
        for tracker in self.trackers:
            tracker.ask_to_stop()
        deadline = time.monotonic() + self.finish_seconds
        for tracker in self.trackers:
            tracker.finish(max(0.1, deadline - time.monotonic()))


class ProcessTracker:
    """The feeding process as the run sees it: started, watched by a thread, ended with a deadline."""

    def __init__(self, command: list[str], run_dir: Path, kind: str, later: str):
        self._stop_file, self._log = stop_file(run_dir, kind), log_file(run_dir, kind)
        self._notice = notice_file(run_dir, kind)
        self._kind, self._later = kind, later
        self._warned = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._log.parent.mkdir(exist_ok=True)
            self._stop_file.unlink(missing_ok=True)
            self._notice.unlink(missing_ok=True)
            with self._log.open("ab") as log:
                self._log_limit = log.tell() + MAX_LOG_BYTES
                # Its own session: Ctrl-C at the terminal reaches the run alone, which then ends it.
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            self._warn(f"could not start ({error})")
            return
        threading.Thread(target=self._watch, name="tracker-watch", daemon=True).start()

    def _watch(self) -> None:
        assert self._process is not None
        while True:
            try:
                code = self._process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                self._print_notice()
                if self._log_size() > self._log_limit:
                    self._warn(f"was ended: it wrote {MAX_LOG_BYTES >> 20} MiB to {self._log}")
                    self._kill()
                    return
                continue
            self._print_notice()
            if code != 0:
                self._warn(f"stopped (exit code {code}, see {self._log}{self._last_words()})")
            return

    def _print_notice(self) -> None:
        """Print the notice of the process, once."""
        try:
            text = self._notice.read_text()
            self._notice.unlink()
        except OSError:
            return  # there is none
        print(f"{text}; `{self._later}` sends it later.", file=sys.stderr, flush=True)

    def _log_size(self) -> int:
        try:
            return self._log.stat().st_size
        except OSError:
            return 0  # removed by hand: then it takes no room either

    def _last_words(self) -> str:
        """The last line of the log if it is an error of this package, as a part of a sentence."""
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return f": {lines[-1][:300]}" if lines and "sora_train[" in lines[-1] else ""

    def _warn(self, what: str) -> None:
        if self._warned.acquire(blocking=False):  # once a run
            print(
                f"The tracker {self._kind} {what}: the run is not affected, metrics.jsonl is complete, and "
                f"`{self._later}` sends it later.",
                file=sys.stderr,
                flush=True,
            )

    def ask_to_stop(self) -> None:
        """Ask the process to end, without waiting."""
        if self._process is None or self._process.poll() is not None:
            return
        try:
            self._stop_file.touch()
        except OSError as error:
            self._warn(f"could not be asked to end ({error})")
            self._kill()

    def finish(self, timeout: float) -> None:
        """End within `timeout` seconds, by force after them; warns of what could not be sent."""
        if self._process is None:
            return
        self.ask_to_stop()
        try:
            if self._process.wait(timeout) == 0:
                self._print_offline()
        except subprocess.TimeoutExpired:
            self._warn(f"did not finish in {timeout:.3g} s")
            self._kill()
        try:
            self._stop_file.unlink(missing_ok=True)
        except OSError as error:
            self._warn(f"left {self._stop_file} behind ({error})")

    def _print_offline(self) -> None:
        kept = self._log.parent.parent / "wandb"
        if self._kind == "wandb" and any(kept.glob("offline-run-*")):
            print(
                f"W&B is offline: the run is kept in {kept}, and `{self._later}` sends it.",
                file=sys.stderr,
                flush=True,
            )

    def _kill(self) -> None:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # it ended by itself in between
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            # Unkillable while in the kernel (a dead network mount); the run has warned already.
            return


def start_tracker(cfg: TrackerConfig, run_dir: Path) -> Trackers:
    """Start the processes that feed `run_dir` to the trackers of `cfg`; never fails for their sake."""
    run_dir = Path(run_dir).absolute()
    return Trackers(
        [
            ProcessTracker(
                tracker_command(cfg, run_dir, kind),
                run_dir,
                kind,
                replay_command(cfg, run_dir, kind),
            )
            for kind in cfg.kinds
        ],
        cfg.finish_seconds,
    )


def tracker_command(cfg: TrackerConfig, run_dir: Path, kind: str) -> list[str]:
    """The command that feeds `run_dir` and ends with this process."""
    if kind == "wandb":
        keep_run_id(run_dir)
    module = [
        sys.executable,
        "-m",
        "sora_train.monitoring.tracking.feed",
        str(run_dir),
        "--kind",
        kind,
    ]
    options = ["--project", cfg.project, "--mode", cfg.mode]
    ending = ["--finish-seconds", str(cfg.finish_seconds), "--parent", str(os.getpid())]
    return [*module, *options, *ending]


def replay_command(cfg: TrackerConfig, run_dir: Path, kind: str) -> str:
    """The command that sends the run later, for the user to type."""
    own = ["--project", cfg.project, "--mode", "online"] if kind == "wandb" else []
    return shlex.join(["sora", "track", "replay", str(run_dir), "--kind", kind, *own])


def run_id(run_dir: Path, *, new: bool = False) -> str:
    """W&B's id of a run, kept in its folder so that a resumed run goes on in the same W&B run.

    `new` makes another one, for a run that is sent a second time. A W&B agent has chosen the id already.
    """
    path = run_dir / ID_FILE
    if new or not path.exists():
        agent_id = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
        temporary = path.with_suffix(".tmp")
        temporary.write_text((not new and agent_id) or secrets.token_hex(4))
        os.replace(temporary, path)
    return path.read_text().strip()


def keep_run_id(run_dir: Path) -> None:
    """Have the id before the first checkpoint is written; where it cannot be kept, say so and go on."""
    try:
        run_id(run_dir)
    except OSError as error:
        print(f"no W&B run id could be kept in {run_dir}: {error}", file=sys.stderr, flush=True)
