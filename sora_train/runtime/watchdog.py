"""Watches over one rank's phases: writes where it stands, and ends the process when a phase takes too long.

    health/rank-00003.json    this rank's heartbeat: step, phase, since when, its deadline, its samples
    health/failed.json        the first rank that failed, so that the others stop as well
    health/stacks-00003.txt   what every thread of a rank and its decode processes did when a rank was late
    health/hang.txt           which rank hung, in which phase, at which samples, and everybody's stacks

A thread cannot act while native code holds the interpreter lock, so behind it stands a timer of
`faulthandler`, which writes the stacks and ends the process without Python's help.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sora_train.errors import EXIT_FAULT

FOLDER = "health"
POLL_SECONDS = 0.5
# How long the first rank that is late waits for what the others have to say.
ANSWER_SECONDS = 3.0
# What the timer without Python waits beyond a phase's deadline, and how much later it may go off.
LAST_RESORT_SECONDS = 15.0
REARM_SECONDS = 5.0
# In a larger job the ranks look less often at what the others wrote, to spare the file system.
SMALL_JOB = 64


@dataclass(frozen=True)
class Beat:
    """Where a rank stands. `beats` counts the phases it has entered; `since` and `time` are wall clock."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    beats: int
    since: float
    deadline: float
    samples: list[int]
    time: float = 0.0


class Watchdog:
    """One thread a rank. `enter` begins a phase; the thread does the rest."""

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        size: int,
        heartbeat_seconds: float,
        children: Callable[[], str] = lambda: "",
        place_of: Callable[[int], str] = lambda rank: "",
    ):
        self.folder = run_dir / FOLDER
        self.rank, self.size = rank, size
        self.children = children
        """What the decode processes are doing, as text."""
        self.place_of = place_of
        """A rank's place in the mesh, in words."""
        self._heartbeat_seconds = heartbeat_seconds
        self._glance_seconds = POLL_SECONDS if size <= SMALL_JOB else heartbeat_seconds
        self._host = socket.gethostname()
        self._lock = threading.Lock()
        self._ends: float | None = None
        self._beat = Beat(rank, self._host, os.getpid(), 0, "idle", 0, time.time(), 0.0, [])
        self._written = self._glanced = self._armed_until = 0.0
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._stacks: Any = None

    def start(self) -> None:
        """Begin to watch; rank 0 has cleared the folder of what an earlier attempt left (see `clear`)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._stacks = (self.folder / f"stacks-{self.rank:05d}.txt").open("w")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            self._path("rank").unlink(missing_ok=True)

    def enter(self, phase: str, deadline: float | None, step: int, samples: list[int]) -> None:
        """Begin a phase that may take `deadline` seconds, None for any time."""
        now = time.monotonic()
        with self._lock:
            self._ends = None if deadline is None else now + deadline
            self._beat = Beat(
                self.rank,
                self._host,
                os.getpid(),
                step,
                phase,
                self._beat.beats + 1,
                time.time(),
                deadline or 0.0,
                samples,
            )
        if self._thread is None:
            return
        if deadline is None:
            faulthandler.cancel_dump_traceback_later()
            self._armed_until = 0.0
            return
        # The thread is first by far, unless it cannot run at all. Setting the timer starts a thread, so
        # it is left as it is while it is not far off.
        grace = self._armed_until - (now + deadline)
        if not LAST_RESORT_SECONDS <= grace <= LAST_RESORT_SECONDS + REARM_SECONDS:
            seconds = deadline + LAST_RESORT_SECONDS + REARM_SECONDS
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._stacks)
            self._armed_until = now + seconds

    def failed(self, error: BaseException) -> None:
        """Tell the other ranks that this one fails, unless another was first; they stop within a second."""
        text = json.dumps(asdict(self._beat) | {"error": str(error)[:2000]})
        try:
            with self._path("failed").open("x") as file:
                file.write(text)
        except OSError:
            return

    def _path(self, kind: str) -> Path:
        names = {"rank": f"rank-{self.rank:05d}.json", "stacks": f"stacks-{self.rank:05d}.txt"}
        return self.folder / names.get(kind, f"{kind}.json")

    def _watch(self) -> None:
        while not self._stopping.wait(POLL_SECONDS):
            try:
                self._look()
            except OSError as error:
                # A file system that is away must not end the watch over the deadlines.
                print(f"health: {error}", file=sys.stderr, flush=True)

    def _look(self) -> None:
        with self._lock:
            beat, ends = self._beat, self._ends
        now = time.monotonic()
        if ends is not None and now > ends:
            self._expire(beat)
        if now - self._written >= self._heartbeat_seconds:
            write_beat(self._path("rank"), beat)
            self._written = now
        if now - self._glanced >= self._glance_seconds:
            self._follow_others(beat)
            self._glanced = now

    def _follow_others(self, beat: Beat) -> None:
        if (self.folder / "late").exists() and beat.phase != "idle":
            self._expire(beat)
        failure = read_json(self._path("failed"))
        if failure is not None and failure["rank"] != self.rank and beat.phase != "idle":
            print(
                f"error: rank {failure['rank']} failed in phase `{failure['phase']}` of step {failure['step']}"
                f"{in_mesh(self.place_of(failure['rank']), ' (at {})')}: "
                f"{failure['error']}; rank {self.rank} stops with it",
                file=sys.stderr,
                flush=True,
            )
            # The main thread may wait for that rank in native code, for ever.
            os._exit(EXIT_FAULT)

    def _expire(self, beat: Beat) -> None:
        """Tell what hangs and end the process, whatever becomes of the telling."""
        try:
            print(
                f"rank {self.rank}: phase `{beat.phase}` of step {beat.step} is late or another rank's is",
                file=sys.stderr,
                flush=True,
            )
            self._tell(beat)
        finally:
            os._exit(EXIT_FAULT)

    def _tell(self, beat: Beat) -> None:
        """The first rank that is late writes the report for all, the others what they do."""
        write_beat(self._path("rank"), beat)
        try:
            (self.folder / "late").touch(exist_ok=False)
            first = True
        except FileExistsError:
            first = False
        self._write_stacks()
        if first:
            print(f"error: {self._report(beat)}", file=sys.stderr, flush=True)
        else:
            time.sleep(ANSWER_SECONDS + POLL_SECONDS)

    def _write_stacks(self) -> None:
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        self._stacks.write(self.children())
        self._stacks.flush()

    def _report(self, beat: Beat) -> str:
        """Wait for the others, then write hang.txt; returns the sentence that names the culprit."""
        asked = time.monotonic()
        answered: set[int] = {self.rank}
        while len(answered) < self.size and time.monotonic() - asked < ANSWER_SECONDS:
            time.sleep(POLL_SECONDS / 2)
            answered = {r for r in range(self.size) if self._stacks_of(r)}
        beats = [read_json(self.folder / f"rank-{rank:05d}.json") for rank in range(self.size)]
        sentence = verdict(beat, beats, answered, self.folder / "hang.txt", self.place_of)
        lines = (line_of(rank, other, self.place_of(rank)) for rank, other in enumerate(beats))
        parts = [sentence, "", *lines]
        for rank in sorted(answered):
            parts += ["", f"--- stacks of rank {rank}", self._stacks_of(rank)]
        temporary = self.folder / "hang.tmp"
        temporary.write_text("\n".join(parts) + "\n")
        temporary.replace(self.folder / "hang.txt")
        return sentence

    def _stacks_of(self, rank: int) -> str:
        path = self.folder / f"stacks-{rank:05d}.txt"
        return path.read_text(errors="replace") if path.exists() else ""


def clear(run_dir: Path) -> None:
    """Remove what an earlier attempt left; rank 0 does so before any rank starts to watch."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("late", "failed.json", "rank-*.json", "stacks-*.txt", "hang.tmp"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def verdict(
    late: Beat,
    beats: list[dict[str, Any] | None],
    answered: set[int],
    report: Path,
    place_of: Callable[[int], str] = lambda rank: "",
) -> str:
    """Which rank the others wait for: one that does not answer, else the one that is furthest behind."""
    silent = [rank for rank in range(len(beats)) if rank not in answered]
    known = [beat for beat in beats if beat is not None]
    if silent:
        rank, why = (
            silent[0],
            "does not answer (stopped, stuck in native code, or its node is gone)",
        )
        if len(silent) > 1:
            why += f", nor do {len(silent) - 1} others"
    else:
        rank = min(known, key=lambda beat: (beat["step"], beat["beats"]))["rank"]
        same = len({(beat["step"], beat["beats"]) for beat in known}) == 1
        why = "is where all ranks are" if same and len(known) > 1 else "is the furthest behind"
        why = "hangs" if len(beats) == 1 else why
    beat = beats[rank] or {}
    place = (
        f"phase `{beat.get('phase', 'unknown')}` of step {beat.get('step', 'unknown')} "
        f"(host {beat.get('host', 'unknown')}, process {beat.get('pid', 'unknown')}"
        f"{in_mesh(place_of(rank))})"
    )
    samples = beat.get("samples") or []
    rows = f", at rows {', '.join(map(str, samples[:8]))}" if samples else ""
    return (
        f"no progress for {late.deadline:g} s in phase `{late.phase}` of step {late.step}: rank {rank} in {place} "
        f"{why}{rows}; stacks of all ranks are in {report}, and the same command goes on from the last checkpoint"
    )


def in_mesh(place: str, form: str = ", {}") -> str:
    """A place in the mesh as a part of a sentence; nothing where the mesh has but one."""
    return form.format(place) if place else ""


def line_of(rank: int, beat: dict[str, Any] | None, place: str = "") -> str:
    if beat is None:
        return f"rank {rank}: has never written a heartbeat{in_mesh(place)}"
    return (
        f"rank {rank}: step {beat['step']}, phase {beat['phase']} for {beat['time'] - beat['since']:.0f} s, "
        f"host {beat['host']}, process {beat['pid']}{in_mesh(place)}, rows {beat['samples'][:8]}"
    )


def write_beat(path: Path, beat: Beat) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(beat) | {"time": time.time()}))
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """What a small file holds, None where it is not there or not whole yet."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
