"""The process behind a tracker: follows a run folder and sends what appears, each row once.

    python -m sora_train.monitoring.tracking.feed RUN --kind wandb --parent PID

It is started by a run (process.py) or, with `once`, by `sora track replay`. It holds at most a block
of metrics.jsonl in memory, ends with its run, and ends hard when ending takes too long.
"""

import argparse
import fcntl
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import yaml

from sora_train.errors import SoraError, UserError
from sora_train.monitoring.events import Event, events
from sora_train.monitoring.goodput import STARTS, starts
from sora_train.monitoring.tracking.process import POLL_SECONDS, own_file, stop_file

KINDS = ("wandb", "tensorboard")
MODES = ("auto", "online", "offline")
BLOCK_BYTES = 1 << 20
ALERTS = ("restart", "spike", "rollback", "stall", "failure")
RECENT_SECONDS = 600.0
GRACE_SECONDS = 10
"""How much longer than its run would wait this process may take to end; then the kernel ends it."""


class Sink(Protocol):
    """Where rows go: a W&B run, a TensorBoard folder."""

    name: str
    """Names what was sent where: what went into an offline W&B run has not reached the online one."""

    def confirmed_step(self) -> int:
        """Rows up to this step are known to have arrived, whatever was remembered here; -1: none are."""

    def config(self, values: dict[str, Any]) -> None:
        """The run's configuration; may come again with other values."""

    def row(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        """Numbers of one step."""

    def samples(self, step: int, clips: list[tuple[Path, str]], sheet: Path | None) -> None:
        """Clips with their prompts, and their contact sheet."""

    def alert(self, step: int, title: str, text: str) -> None:
        """Something that somebody should look at."""

    def flush(self) -> bool:
        """Whether everything sent so far is stored durably."""

    def close(self) -> None:
        """Send what is left; afterwards everything is stored durably."""


class Tail:
    """The whole new lines of a growing file; starts over when the file was replaced or cut."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = 0
        self._inode = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """What is new, read a block at a time; a damaged line is left out with a message."""
        while True:
            lines = self._next_lines()
            if not lines:
                return
            for line in lines:
                try:
                    row = json.loads(line)
                    yield {"step": int(row["step"]), "time": float(row["time"]), **row}
                except (ValueError, TypeError, KeyError):
                    print(f"left out a damaged line of {self._path}: {line[:80]!r}", flush=True)

    def _next_lines(self) -> list[bytes]:
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._offset, self._inode = 0, status.st_ino
                file.seek(self._offset)
                data = file.read(BLOCK_BYTES)
                if len(data) == BLOCK_BYTES and b"\n" not in data:
                    data += file.readline()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return whole.splitlines()


class Feed:
    """Sends what is new in a run folder, and remembers what was sent.

    Remembers, by metric, the last step sent, so that a resumed run, which repeats rows, sends each
    once. After a tracker that was killed rows are sent again rather than lost, save those that the
    tracker itself says it has.
    """

    def __init__(self, sink: Sink, run_dir: Path, *, alerts: bool = True):
        """`alerts`: send alerts of what happens to the run from now on; not for one that is long over."""
        self._sink = sink
        self._alerts, self._began = alerts, time.time()
        self._reported: set[str] = set()
        self._run_dir = run_dir
        self._tail = Tail(run_dir / "metrics.jsonl")
        self._config_sent = ""
        self._state_path = own_file(run_dir, f"{sink.name}.json")
        self._last_step: dict[str, int] = {}
        self._samples: list[str] = []
        self._confirmed = sink.confirmed_step()
        if self._state_path.exists():
            state = json.loads(self._state_path.read_text())
            self._last_step, self._samples = state["last_step"], state["samples"]
            self._reported = set(state.get("alerts", ()))

    def push(self, *, final: bool = False) -> int:
        """Send everything that is new, and say how many rows; a samples folder once it is whole, or as it
        is at the end."""
        self._push_config()
        # Looked for before the rows: whoever has the samples of a step then has its rows too.
        folders = self._new_samples(final)
        sent = sum(map(self._push_row, self._tail.rows()))
        for folder in folders:
            self._push_samples(folder)
        if self._alerts:
            self._push_alerts()
        if self._sink.flush():
            self.save()
        return sent

    def save(self) -> None:
        """Remember what was sent; called only once the sink has all of it for good."""
        self._state_path.parent.mkdir(exist_ok=True)
        temporary = self._state_path.with_suffix(".tmp")
        state = {
            "last_step": self._last_step,
            "samples": self._samples,
            "alerts": sorted(self._reported),
        }
        temporary.write_text(json.dumps(state))
        os.replace(temporary, self._state_path)

    def _push_config(self) -> None:
        path = self._run_dir / "config.yaml"
        known = self._run_dir / STARTS
        config = path.read_text() if path.exists() else ""
        # A start is written down after its config, and has the digest of its code.
        text = config + (known.read_text() if known.exists() else "")
        if text != self._config_sent:
            begun = starts(self._run_dir)
            code = {"code": begun[-1].get("code", {})} if begun else {}
            self._sink.config((yaml.safe_load(config) or {}) | code)
            self._config_sent = text

    def _push_alerts(self) -> None:
        """What has happened since the last push, one alert for all events of a kind."""
        new = [event for event in events(self._run_dir) if event.key not in self._reported]
        self._reported |= {event.key for event in new}
        for kind in ALERTS:
            recent = [event for event in new if event.kind == kind and self._is_recent(event)]
            if recent:
                more = f" (and {len(recent) - 1} more)" if len(recent) > 1 else ""
                title = f"{self._run_dir.name}: {kind}"
                self._sink.alert(recent[-1].step, title, f"{recent[-1].text}{more}")

    def _is_recent(self, event: Event) -> bool:
        """Whether it is not so old that another process may have reported it."""
        return event.time == 0 or event.time > self._began - RECENT_SECONDS

    def _push_row(self, row: dict[str, Any]) -> bool:
        step = row["step"]
        new = {
            name: value
            for name, value in row.items()
            if name not in ("step", "time")
            and step > max(self._confirmed, self._last_step.get(name, -1))
        }
        if new:
            self._sink.row(step, row["time"], new)
            self._last_step.update(dict.fromkeys(new, step))
        return bool(new)

    def _new_samples(self, final: bool) -> list[Path]:
        folders = [
            path.parent for path in sorted(self._run_dir.glob("samples/step-*/prompts.json"))
        ]
        return [
            folder
            for folder in folders
            if folder.name not in self._samples
            and (final or (folder / "contact_sheet.png").exists())
        ]

    def _push_samples(self, folder: Path) -> None:
        """Send one folder of samples; an error in it does not stop the numbers."""
        try:
            entries = json.loads((folder / "prompts.json").read_text())
            clips = [(folder / entry["file"], str(entry["prompt"])) for entry in entries]
            clips = [(path, prompt) for path, prompt in clips if path.exists()]
            sheet = folder / "contact_sheet.png"
            step = int(folder.name.removeprefix("step-"))
            self._sink.samples(step, clips, sheet if sheet.exists() else None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"left out the samples of {folder}: {error}", flush=True)
        self._samples.append(folder.name)


@dataclass(frozen=True)
class FeedRequest:
    """What is sent where. `parent` is the run's process, or None to send what is there and end."""

    run_dir: Path
    kind: str
    project: str
    mode: str
    parent: int | None = None
    finish_seconds: float = 30.0
    new_run: bool = False

    @property
    def hard_exit_seconds(self) -> int:
        return math.ceil(self.finish_seconds) + GRACE_SECONDS


def follow(request: FeedRequest) -> int:
    """Send the run until asked to stop, until its process is gone, or just once; returns the rows sent.

    Raises:
        UserError: another process feeds this run, or the tracker's package is missing.
    """
    lock = _lock(request)
    ending = threading.Event()
    if request.parent is not None:
        # What an exec has inherited may ignore it.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        threading.Thread(target=_end_with_run, args=(request, ending), daemon=True).start()
    sink = open_sink(request)
    feed = Feed(sink, request.run_dir, alerts=request.parent is not None)
    sent = 0
    while True:
        # Check the stop file before the last push: what was written before it is then sent.
        over = request.parent is None or ending.is_set()
        sent += feed.push(final=over)
        if over:
            break
        ending.wait(POLL_SECONDS)
    sink.close()
    feed.save()
    lock.close()
    return sent


def open_sink(request: FeedRequest) -> Sink:
    """The sink of a kind, whose package is imported only here."""
    if request.kind == "wandb":
        from sora_train.monitoring.tracking.wandb import WandbSink

        # A live run is recorded whatever W&B says; who sends one by hand wants to know.
        return WandbSink(
            request.run_dir,
            project=request.project,
            mode=request.mode,
            new_run=request.new_run,
            may_go_offline=request.parent is not None,
        )
    from sora_train.monitoring.tracking.tensorboard import TensorBoardSink

    return TensorBoardSink(request.run_dir)


def replay(
    run_dir: Path,
    kinds: Sequence[str] = (),
    project: str | None = None,
    mode: str = "auto",
    *,
    new_run: bool = False,
) -> str:
    """`sora track replay`: send what a run folder holds and its trackers lack; returns what was sent, in words.

    `kinds` and `project` default to the run's own, W&B for a run that had no tracker. `new_run` sends
    everything again, into a W&B run of its own.

    Raises:
        UserError: it is no run folder, a live run feeds it, a package is missing, or W&B refuses.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        raise UserError(f"{run_dir} has no metrics.jsonl; give the folder of a run")
    if mode not in MODES:
        raise UserError(f"--mode {mode} is not one of {', '.join(MODES)}")
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--kind {kind} is not one of {', '.join(KINDS)}")
    path = run_dir / "config.yaml"
    config = (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}
    tracker = config.get("tracker") or {}
    own = tracker.get("kind", "none")
    chosen = list(kinds) or ([own] if isinstance(own, str) else list(own))
    project = project or tracker.get("project", "sora_train")
    lines = []
    for kind in ["wandb" if kind == "none" else kind for kind in chosen]:
        sent = follow(FeedRequest(run_dir.absolute(), kind, str(project), mode, new_run=new_run))
        lines.append(f"{kind}: {sent:,} rows sent" if sent else f"{kind}: has every row already")
    return "\n".join(lines)


def _end_with_run(request: FeedRequest, ending: threading.Event) -> None:
    """Notice the stop file, or that the run is gone, even while the tracker hangs; then the clock runs."""
    stop = stop_file(request.run_dir, request.kind)
    while not (stop.exists() or os.getppid() != request.parent):
        time.sleep(POLL_SECONDS / 4)
    # The kernel's clock, with its default action: it needs no interpreter, which a library may hold up.
    signal.alarm(request.hard_exit_seconds)
    ending.set()


def _lock(request: FeedRequest) -> IO[str]:
    """Hold the run's feed of a kind: two at once would send rows twice.

    The feed of a run that was killed may still be ending; a resumed run waits for it.
    """
    path = own_file(request.run_dir, f"{request.kind}.lock")
    path.parent.mkdir(exist_ok=True)
    lock = path.open("a")
    patience = 0 if request.parent is None else request.hard_exit_seconds + 5
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{request.run_dir} is being sent to {request.kind} by another process (a live run does so "
                    "by itself); wait until that has ended"
                ) from None
            time.sleep(POLL_SECONDS / 4)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sora_train.monitoring.tracking.feed", description=__doc__
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--kind", required=True, choices=KINDS)
    parser.add_argument("--project", default="sora_train")
    parser.add_argument("--mode", choices=MODES, default="auto")
    parser.add_argument("--finish-seconds", type=float, default=30.0)
    parser.add_argument("--parent", type=int, required=True, help="end when this process is gone")
    options = parser.parse_args(arguments)
    try:
        follow(FeedRequest(**{**vars(options), "run_dir": options.run_dir.absolute()}))
    except SoraError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
