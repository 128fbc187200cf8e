"""What every benchmark shares: repeated timing, the machine and commit beside each number, the files.

A number without its machine, its commit and its command is not a result; here it cannot be written
without them.
"""

import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from sora_train.base.code_version import commit, cpu_model
from sora_train.base.files import write_atomically


@dataclass(frozen=True)
class Stats:
    """Median and spread of `n` measurements."""

    median: float
    p10: float
    p90: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stats":
        """Raises ValueError if there are no values."""
        if not values:
            raise ValueError("no measurement was taken")
        ordered = sorted(values)
        return cls(statistics.median(ordered), _at(ordered, 0.1), _at(ordered, 0.9), len(ordered))


def _at(ordered: Sequence[float], share: float) -> float:
    """Quantile by linear interpolation between neighbours (numpy's default)."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def measure(fn: Callable[[], object], warmup: int, repeats: int) -> Stats:
    """Seconds of a call of `fn`, after `warmup` calls that are not counted; waits for the GPU."""
    for _ in range(warmup):
        fn()
    seconds = []
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        fn()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return Stats.of(seconds)


def synchronize() -> None:
    """Wait until the GPU has done what it was told; a clock that is read before tells of the telling."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def grid_of(tokens: int) -> tuple[int, int, int]:
    """Frames, rows and columns with `tokens` tokens: up to four frames, each as square as can be."""
    frames = math.gcd(4, tokens)
    area = tokens // frames
    rows = next(n for n in range(math.isqrt(area), 0, -1) if area % n == 0)
    return frames, rows, area // rows


def machine() -> dict[str, str | int]:
    """The facts a number depends on."""
    gpus = torch.cuda.device_count()
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        "gpu": torch.cuda.get_device_name(0) if gpus else "none",
        "gpus": gpus,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Measured:
    """One number of a result: its spread, its unit, and how many digits are worth showing."""

    stats: Stats
    unit: str
    form: str = "{:.4g}"


@dataclass
class Result:
    """Everything a benchmark found; `facts` are single values, `measured` have a spread."""

    name: str
    measured: dict[str, Measured]
    facts: dict[str, str | int | float | None] = field(default_factory=dict)
    command: str = field(default_factory=lambda: shlex.join(["sora", *sys.argv[1:]]))
    machine: dict[str, str | int] = field(default_factory=machine)
    commit: str = field(default_factory=lambda: commit() or "unknown")
    written: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def write(self, out: Path) -> Path:
        """Write `out`/NAME.json and NAME.md, each atomically; returns the path of the JSON."""
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{self.name}.json"
        write_atomically(path, json.dumps(self.to_dict(), indent=1) + "\n")
        write_atomically(path.with_suffix(".md"), self.to_markdown())
        return path

    def to_dict(self) -> dict[str, object]:
        measured = {
            key: {**asdict(value.stats), "unit": value.unit} for key, value in self.measured.items()
        }
        return {
            "name": self.name,
            "measured": measured,
            "facts": self.facts,
            "machine": self.machine,
            "commit": self.commit,
            "command": self.command,
            "written": self.written,
        }

    def to_markdown(self) -> str:
        lines = [
            f"# {self.name}",
            "",
            "| | median | p10 | p90 | unit | n |",
            "|---|--:|--:|--:|---|--:|",
        ]
        for key, value in self.measured.items():
            shown = [
                value.form.format(number)
                for number in (value.stats.median, value.stats.p10, value.stats.p90)
            ]
            lines.append(f"| {key} | {' | '.join(shown)} | {value.unit} | {value.stats.n} |")
        lines += ["", "| | |", "|---|---|"]
        about = {**self.facts, **self.machine, "commit": self.commit, "written": self.written}
        lines += [f"| {key} | {_cell(value)} |" for key, value in about.items()]
        return "\n".join([*lines, "", "```", self.command, "```", ""])


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    shown = f"{value:.6g}" if isinstance(value, float) else str(value)
    return "not known" if value is None else shown.replace("|", "\\|")
