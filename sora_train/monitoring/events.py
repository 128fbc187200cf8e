"""What happened to a run besides its steps, read from its folder: restarts, spikes, roll-backs, failures, stalls.

The alerts of trackers, the marks of the report and the last lines of `sora watch` are all these events.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sora_train.base.files import read_json, read_json_lines
from sora_train.monitoring.goodput import starts

Kind = Literal["restart", "spike", "rollback", "failure", "stall", "quarantine"]
STALL_SECONDS = 300.0
"""A rank that spends this long in one part of a step is reported, though its deadline has not passed yet."""


@dataclass(frozen=True)
class Event:
    """`key` is unique in the run. `time` is wall clock, 0 where it is not known."""

    key: str
    kind: Kind
    step: int
    time: float
    text: str


def events(run_dir: Path, now: float | None = None) -> list[Event]:
    """All events of a run, by step; damaged files are skipped, since they may be half written."""
    now = time.time() if now is None else now
    all_events = [
        *_restarts(run_dir),
        *_spikes(run_dir),
        *_rollbacks(run_dir),
        *_quarantined(run_dir),
        *_failure(run_dir),
        *_stall(run_dir, now),
    ]
    return sorted(all_events, key=lambda event: (event.step, event.time))


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
    spikes = []
    for path in sorted(run_dir.glob("spikes/step-*.json")):
        spike = read_json(path)
        if spike is not None:
            text = f"step {spike['step']} was skipped: {spike['reason']}, loss {spike['loss']}"
            spikes.append(Event(path.stem, "spike", int(spike["step"]), path.stat().st_mtime, text))
    return spikes


def _rollbacks(run_dir: Path) -> list[Event]:
    rollbacks = []
    for row in read_json_lines(run_dir / "rollbacks.jsonl"):
        step, to = int(row["from_step"]), int(row["to_step"])
        text = f"went back from step {step} to {to}"
        rollbacks.append(Event(f"rollback-{row['number']}", "rollback", step, 0.0, text))
    return rollbacks


def _quarantined(run_dir: Path) -> list[Event]:
    lines = [row for row in read_json_lines(run_dir / "quarantine.jsonl") if "step" in row]
    if not lines:
        return []
    step = int(lines[-1]["step"] or 0)
    text = f"{len(lines):,} clip(s) in quarantine.jsonl"
    return [Event(f"quarantine-{len(lines)}", "quarantine", step, 0.0, text)]


def _failure(run_dir: Path) -> list[Event]:
    failure = read_json(run_dir / "health/failed.json")
    if failure is not None:
        text = f"rank {failure['rank']} failed in phase {failure['phase']}: {failure['error']}"
        since = failure["since"]
        return [Event(f"failure-{since}", "failure", int(failure["step"]), float(since), text)]
    hang = run_dir / "health/hang.txt"
    if hang.exists():
        lines = hang.read_text().splitlines() or ["hung"]
        when = hang.stat().st_mtime
        step = (read_json(run_dir / "health/rank-00000.json") or {}).get("step", 0)
        return [Event(f"hang-{when}", "failure", int(step), when, lines[0])]
    return []


def _stall(run_dir: Path, now: float) -> list[Event]:
    beat = read_json(run_dir / "health/rank-00000.json")
    if beat is None or now - beat["time"] > STALL_SECONDS or not is_step(beat["phase"]):
        return []
    seconds = beat["time"] - beat["since"]
    if seconds < min(STALL_SECONDS, beat["deadline"] / 2 or STALL_SECONDS):
        return []
    text = f"no progress for {seconds:.0f} s in phase {beat['phase']} of step {beat['step']}"
    return [Event(f"stall-{beat['since']}", "stall", int(beat["step"]), beat["since"], text)]


def is_step(phase: str) -> bool:
    """Whether a phase is a part of a step, which takes seconds and not minutes."""
    return phase in ("data", "exchange", "compute", "update", "loop")
