"""Where the time of a run goes, across restarts: goodput, and what is lost beside it.

Goodput is the share of the wall clock since the run first began that was spent in steps that count
("ML productivity goodput", Google Cloud 2024, https://cloud.google.com/blog/products/ai-machine-learning/
goodput-metric-as-measure-of-ml-productivity; its runtime part). The parts add up to one:

    productive   steps that count, without their waiting for data
    data_wait    waiting for data in them
    checkpoint   time that saves held up the run
    evaluation   validation and samples
    wasted       whatever was done after the step that a restart or a roll-back went back to, and skipped steps
    other        the rest: starts, the time between an end and the next start, the loop's own work

A row carries the shares and the seconds they are of, so the rows of metrics.jsonl are all there is to
remember. RUN/starts.jsonl holds when each start was, on how many ranks, from which step, by which code.
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sora_train.base.code_version import code_digest
from sora_train.base.files import read_json_lines

STARTS = "starts.jsonl"
PARTS = ("productive", "data_wait", "checkpoint", "evaluation", "wasted")
PHASES = {
    "save": "checkpoint",
    "probe": "evaluation",
    "validation": "evaluation",
    "samples": "evaluation",
}
"""Which part a phase of the run counts in."""

Row = Mapping[str, float]


class Goodput:
    """Adds up the parts of a run. `began` is the wall clock of its very first start."""

    def __init__(self, began: float):
        self.began = began
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._seen: dict[str, float] = {}

    def step(self, seconds: float, waited: float, *, counts: bool) -> None:
        """A step took `seconds`, `waited` of them for data; one that was skipped counts for nothing."""
        waited = min(waited, seconds)
        if not counts:
            self.seconds["wasted"] += seconds
            return
        self.seconds["productive"] += seconds - waited
        self.seconds["data_wait"] += waited

    def phases(self, totals: Mapping[str, float]) -> None:
        """Update the parts from the seconds that this process has spent in each phase so far."""
        for phase, part in PHASES.items():
            total = totals.get(phase, 0.0)
            self.seconds[part] += total - self._seen.get(phase, 0.0)
            self._seen[phase] = total

    def go_on(self, kept: Row | None, lost: Row | None) -> None:
        """Another process stopped after the row `lost`, and what came after the row `kept` will be done again."""
        was, end = seconds_of(kept), seconds_of(lost)
        if any(end.values()):
            self._take_back(was, end)
        else:
            self.seconds = was

    def go_back(self, kept: Row | None) -> None:
        """This process goes back to where it was when the row `kept` was written."""
        self._take_back(seconds_of(kept), self.seconds)

    def _take_back(self, was: dict[str, float], end: dict[str, float]) -> None:
        self.seconds = was | {
            "wasted": was["wasted"] + max(0.0, sum(end.values()) - sum(was.values()))
        }

    def row(self, now: float) -> dict[str, float]:
        """The shares at wall clock `now`."""
        whole = max(now - self.began, sum(self.seconds.values()), 1e-9)
        shares = {f"goodput/{part}": seconds / whole for part, seconds in self.seconds.items()}
        rest = max(0.0, 1.0 - sum(shares.values()))
        return {"goodput/seconds": whole, **shares, "goodput/other": rest}


def seconds_of(row: Row | None) -> dict[str, float]:
    """Seconds of each part, from a row of metrics; zeros where the row has none."""
    if row is None:
        return dict.fromkeys(PARTS, 0.0)
    whole = row.get("goodput/seconds", 0.0)
    return {part: row.get(f"goodput/{part}", 0.0) * whole for part in PARTS}


def note_start(run_dir: Path, step: int, ranks: int, began: float) -> float:
    """Write down that the run starts or goes on; returns the wall clock of its first start."""
    line = json.dumps({"time": began, "step": step, "ranks": ranks, "code": code_digest()})
    with (run_dir / STARTS).open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    return float(starts(run_dir)[0]["time"])


def starts(run_dir: Path) -> list[dict[str, Any]]:
    """Every start of a run in order: its wall clock, the step it went on from, its ranks."""
    rows = []
    for row in read_json_lines(run_dir / STARTS):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            rows.append(row | {name: float(row[name]) for name in ("time", "step", "ranks")})
    return rows


def elapsed(since_monotonic: float) -> float:
    """The wall clock of a moment that was noted on the monotonic clock."""
    return time.time() - (time.monotonic() - since_monotonic)
