"""What happened to a run besides its steps, read from its folder: restarts, spikes, roll-backs, failures, stalls.

The alerts of trackers, the marks of the report and the last lines of `sora watch` are all these events.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sora_train.monitoring.goodput import starts

Kind = Literal["restart", "spike", "rollback", "failure", "stall", "quarantine"]
STALL_SECONDS = 300.0
"""A rank that is so long in one part of a step, without being late yet, is worth a word."""


@dataclass(frozen=True)
class Event:
    """`key` tells it from all others of its run. `time` is wall clock, 0 where it is not known."""

    key: str
    kind: Kind
    step: int
    time: float
    text: str


def events(run_dir: Path, now: float | None = None) -> list[Event]:
    """All events of a run, by step; damaged files are passed over, since they may be half written."""
    now = time.time() if now is None else now
    found = [*_restarts(run_dir), *_spikes(run_dir), *_rollbacks(run_dir), *_quarantined(run_dir)]
    found += [*_failure(run_dir), *_stall(run_dir, now)]
    return sorted(found, key=lambda event: (event.step, event.time))


def _restarts(run_dir: Path) -> list[Event]:
    return [
        Event(
            f"restart-{number}",
            "restart",
            int(start["step"]),
            start["time"],
            f"went on from step {start['step']:,.0f} on {start['ranks']:,.0f} rank(s)",
        )
        for number, start in enumerate(starts(run_dir)[1:], 1)
    ]


def _spikes(run_dir: Path) -> list[Event]:
    found = []
    for path in sorted(run_dir.glob("spikes/step-*.json")):
        told = read_small(path)
        if told is not None:
            text = f"step {told['step']} was skipped: {told['reason']}, loss {told['loss']}"
            found.append(Event(path.stem, "spike", int(told["step"]), path.stat().st_mtime, text))
    return found


def _rollbacks(run_dir: Path) -> list[Event]:
    found = []
    for told in read_lines(run_dir / "rollbacks.jsonl"):
        step, to = int(told["from_step"]), int(told["to_step"])
        text = f"went back from step {step} to {to}"
        found.append(Event(f"rollback-{told['number']}", "rollback", step, 0.0, text))
    return found


def _quarantined(run_dir: Path) -> list[Event]:
    lines = [told for told in read_lines(run_dir / "quarantine.jsonl") if "step" in told]
    if not lines:
        return []
    step = int(lines[-1]["step"] or 0)
    text = f"{len(lines):,} clip(s) in quarantine.jsonl"
    return [Event(f"quarantine-{len(lines)}", "quarantine", step, 0.0, text)]


def _failure(run_dir: Path) -> list[Event]:
    told = read_small(run_dir / "health/failed.json")
    if told is not None:
        text = f"rank {told['rank']} failed in phase {told['phase']}: {told['error']}"
        key = f"failure-{told['since']}"
        return [Event(key, "failure", int(told["step"]), float(told["since"]), text)]
    hang = run_dir / "health/hang.txt"
    if hang.exists():
        lines = hang.read_text().splitlines() or ["hung"]
        when = hang.stat().st_mtime
        step = (read_small(run_dir / "health/rank-00000.json") or {}).get("step", 0)
        return [Event(f"hang-{when}", "failure", int(step), when, lines[0])]
    return []


def _stall(run_dir: Path, now: float) -> list[Event]:
    beat = read_small(run_dir / "health/rank-00000.json")
    if beat is None or now - beat["time"] > STALL_SECONDS or not is_step(beat["phase"]):
        return []
    seconds = beat["time"] - beat["since"]
    if seconds < min(STALL_SECONDS, beat["deadline"] / 2 or STALL_SECONDS):
        return []
    text = f"no progress for {seconds:.0f} s in phase {beat['phase']} of step {beat['step']}"
    return [Event(f"stall-{beat['since']}", "stall", int(beat["step"]), beat["since"], text)]


def is_step(phase: str) -> bool:
    """Whether a phase is a part of a step, which takes no minutes."""
    return phase in ("data", "exchange", "compute", "update", "loop")


def read_small(path: Path) -> dict[str, Any] | None:
    """A small JSON object, None where it is not there or not whole."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a small file of JSON objects."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found
