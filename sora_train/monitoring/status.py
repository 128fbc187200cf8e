"""What a run is doing, from its folder alone: its state, its last numbers and their trend.

The files are the truth, so this works while the run goes on, after it, and from any machine that sees
the folder. Of large files only the end is read: a run of a million steps costs what a short one does.
"""

import contextlib
import json
import os
import re
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from sora_train.base.files import read_json
from sora_train.errors import UserError
from sora_train.monitoring.events import Event, events, is_step

TAIL_BYTES = 256 << 10
SEARCH_BYTES = 4 << 20
"""How far back the last validation is searched for."""
RECENT = 32
"""Rows whose mean is shown for numbers that are noisy."""
SILENT_SECONDS = 60.0
STALL_STEPS = 10.0
"""A part of a step that takes so many of its median steps, and no less than SILENT_SECONDS, is called stalled."""

NUMBER = re.compile(r"\d+\.?\d*")

Row = dict[str, float]
State = Literal["running", "stalled", "silent", "failed", "finished", "left", "new"]
BAD: tuple[State, ...] = ("stalled", "silent", "failed")


@dataclass(frozen=True)
class RunStatus:
    """What a run is doing at the wall clock `now`."""

    run_dir: Path
    state: State
    why: str
    """One sentence about the state."""
    rows: list[Row]
    """The last rows of metrics.jsonl."""
    last: Row
    """The newest value of every metric in them, and of the last validation."""
    steps: int
    """How many the run will take; 0 where that is not known."""
    checkpoint: tuple[int, float] | None
    """Step and wall clock of the newest checkpoint."""
    events: list[Event] = field(default_factory=list)
    now: float = 0.0

    @property
    def step(self) -> int:
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def eta(self) -> float | None:
        """Seconds left at the pace of the last rows, everything between the steps included."""
        if len(self.rows) < 2 or not self.steps or self.state in ("finished", "failed"):
            return None
        first, last = self.rows[0], self.rows[-1]
        # Where a restart lies between two rows their pace jumps; the median over pairs is not affected.
        paces = [
            (b["time"] - a["time"]) / (b["step"] - a["step"])
            for a, b in zip(self.rows, self.rows[1:], strict=False)
            if b["step"] > a["step"]
        ]
        whole = (last["time"] - first["time"]) / max(1.0, last["step"] - first["step"])
        pace = min(whole, 3 * statistics.median(paces)) if paces else whole
        return max(0.0, (self.steps - last["step"]) * pace)

    def recent(self, name: str) -> float | None:
        """Mean of a metric over the last rows that have it."""
        values = [row[name] for row in self.rows[-RECENT:] if name in row]
        return statistics.fmean(values) if values else None

    def family(self, beginning: str) -> dict[str, float]:
        """The recent values of all metrics whose names begin so, without that beginning."""
        names = dict.fromkeys(
            name for row in self.rows[-RECENT:] for name in row if name.startswith(beginning)
        )
        # By the numbers in the names: 5 frames come before 17.
        ordered = sorted(names, key=lambda name: ([float(n) for n in NUMBER.findall(name)], name))
        values = {name.removeprefix(beginning): self.recent(name) for name in ordered}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def trend(self) -> float | None:
        """Relative change of the loss from the first to the second half of the last rows."""
        losses = [row["train/loss"] for row in self.rows if "train/loss" in row]
        if len(losses) < 8:
            return None
        half = len(losses) // 2
        before, after = statistics.fmean(losses[:half]), statistics.fmean(losses[half:])
        return (after - before) / abs(before) if before else None


def read_status(run_dir: Path, now: float | None = None) -> RunStatus:
    """The status of a run. Raises UserError where the folder holds no run."""
    now = time.time() if now is None else now
    require_run(run_dir)
    rows = tail_rows(run_dir / "metrics.jsonl")
    last: Row = {}
    for row in [last_with(run_dir / "metrics.jsonl", "val/"), *rows]:
        last.update(row)
    steps, checkpoint = planned_steps(run_dir), newest_checkpoint(run_dir)
    state, why = state_of(run_dir, rows, steps, checkpoint, now)
    return RunStatus(run_dir, state, why, rows, last, steps, checkpoint, events(run_dir, now), now)


def is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("run.json", "metrics.jsonl", "config.yaml"))


def require_run(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise UserError(f"there is no folder {run_dir}; give the folder of a run (its run.dir)")
    if not is_run(run_dir):
        raise UserError(
            f"{run_dir} holds no run (no run.json, config.yaml or metrics.jsonl); give the folder of a run, or one "
            "whose folders are runs"
        )


def runs_in(folder: Path) -> list[Path]:
    """The folder if it is a run, else the runs in it, two levels deep. Raises UserError where there are none."""
    if folder.is_dir() and not is_run(folder):
        run_files = [*folder.glob("*/run.json"), *folder.glob("*/*/run.json")]
        if run_files:
            return sorted({path.parent for path in run_files})
    require_run(folder)
    return [folder]


# -- reading the ends of files --------------------------------------------------------------------


def tail_rows(path: Path, size: int = TAIL_BYTES) -> list[Row]:
    """The whole rows in the last `size` bytes of a file of rows; a line that is cut short is left out."""
    return parse(_lines(path, size))


def _lines(path: Path, size: int) -> list[bytes]:
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            begin = max(0, end - size)
            file.seek(begin)
            data = file.read(size)
    except FileNotFoundError:
        return []
    lines = data.split(b"\n")
    # The part before the first line end began earlier; the part after the last line end is not complete.
    return lines[1 if begin else 0 : -1]


def parse(lines: Iterable[bytes]) -> list[Row]:
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row and "time" in row:
            rows.append(row)
    return rows


def last_with(path: Path, beginning: str) -> Row:
    """The last row, among those within SEARCH_BYTES of the end, that has a metric whose name begins so; else {}."""
    mark = f'"{beginning}'.encode()
    for size in (TAIL_BYTES, SEARCH_BYTES):
        rows = parse([line for line in _lines(path, size) if mark in line][-1:])
        if rows:
            return {k: v for k, v in rows[0].items() if k.startswith(beginning)}
    return {}


# -- state ----------------------------------------------------------------------------------------


def planned_steps(run_dir: Path) -> int:
    """`train.steps` of the run's last part, which knows what `train.epochs` came to; 0 where it is not known."""
    parts = (read_json(run_dir / "run.json") or {}).get("parts") or []
    names = [str(part.get("config", "")) for part in parts if isinstance(part, dict)][-1:]
    for name in [*filter(None, names), "config.yaml"]:
        try:
            text = (run_dir / name).read_text()
        except OSError:
            continue
        section = re.search(r"^train:\n((?:[ ].*\n)*)", text, re.MULTILINE)
        values = yaml.safe_load(section.group(1)) if section else None
        if isinstance(values, dict) and values.get("steps"):
            return int(values["steps"])
    return 0


def newest_checkpoint(run_dir: Path) -> tuple[int, float] | None:
    """Step and time of the newest checkpoint that is committed."""
    committed = []
    for path in run_dir.glob("checkpoints/step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit():
            # It may have been pruned just now.
            with contextlib.suppress(FileNotFoundError):
                committed.append((int(number), path.stat().st_mtime))
    return max(committed, default=None)


def state_of(
    run_dir: Path,
    rows: list[Row],
    steps: int,
    checkpoint: tuple[int, float] | None,
    now: float,
) -> tuple[State, str]:
    """The state of a run and a sentence about it, from its heartbeat and the files it leaves when it ends."""
    failed = read_json(run_dir / "health/failed.json")
    if failed is not None:
        error = " ".join(str(failed["error"]).split())
        return "failed", f"rank {failed['rank']}, phase {failed['phase']}: {error}"
    hang = run_dir / "health/hang.txt"
    if hang.exists():
        return "failed", (hang.read_text().splitlines() or ["hung"])[0]
    beat = read_json(run_dir / "health/rank-00000.json")
    if beat is not None:
        return _alive(beat, rows, now)
    summary = read_json(run_dir / "summary.json") or {}
    step = int(rows[-1]["step"]) if rows else 0
    if summary and int(summary.get("steps", 0)) >= max(step, 1):
        return "finished", f"all {int(summary['steps']):,} steps are done"
    if checkpoint is not None:
        return "left", (
            f"it left in order after step {max(step, checkpoint[0]):,} (exit code 75), and the same command goes on"
        )
    if rows:
        return "silent", "it ended without a message and without a checkpoint; look at its log"
    return "new", "it has not taken a step"


def _alive(beat: dict[str, Any], rows: list[Row], now: float) -> tuple[State, str]:
    silent, since = now - beat["time"], beat["time"] - beat["since"]
    where = f"phase {beat['phase']} of step {beat['step'] + 1:,}"
    if silent > SILENT_SECONDS:
        return "silent", (
            f"no sign of life for {silent:,.0f} s, in {where} on {beat['host']}: it was killed, or its file system "
            "is away"
        )
    times = [row["train/step_seconds"] for row in rows[-RECENT:] if "train/step_seconds" in row]
    limit = max(SILENT_SECONDS, STALL_STEPS * statistics.median(times) if times else 0.0)
    if times and is_step(beat["phase"]) and since > limit:
        return "stalled", f"for {since:,.0f} s in {where} on {beat['host']}"
    return "running", f"in {where} on {beat['host']}"
