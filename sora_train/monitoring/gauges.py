"""What each rank's machine tells of itself: memory, and of its GPU power, clocks, temperature and faults.

A thread looks once a second, off the hot path. What it saw travels with the report of who is slow
(`health.report_every`): each rank sends its columns, and the row gets of each the mean, the least, the
most and the rank where it is worst. A column that no rank has is absent.
"""

import math
import os
import statistics
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from sora_train.errors import UserError

SAMPLE_SECONDS = 1.0
GIB = float(1 << 30)


@dataclass(frozen=True)
class Column:
    """How many readings of a gauge become one number, and which end of the ranks is the bad one."""

    over_time: Literal["mean", "max", "last"]
    worst: Literal["min", "max"] = "max"


COLUMNS: dict[str, Column] = {
    "memory/host": Column("max"),
    "memory/allocated": Column("max"),
    "memory/reserved": Column("max"),
    "gpu/memory": Column("max"),
    "gpu/power": Column("mean"),
    "gpu/clock": Column("mean", "min"),
    "gpu/memory_clock": Column("mean", "min"),
    "gpu/temperature": Column("max"),
    "gpu/utilisation": Column("mean", "min"),
    "gpu/throttled": Column("mean"),
    "gpu/ecc_errors": Column("last"),
    "gpu/xid_errors": Column("last"),
}
"""Units stand in docs/metrics.md."""


class Source(Protocol):
    """Where readings of a GPU come from."""

    def read(self) -> dict[str, float]:
        """One reading by column; what the device does not tell is left out."""


class Gauges:
    """The gauges of one rank. `source` is read by a thread from `start` to `stop`."""

    def __init__(self, source: Source | None, at_report: Callable[[], dict[str, float]]):
        self._source, self._at_report = source, at_report
        self._seen: dict[str, list[float]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._source is not None:
            self._thread = threading.Thread(target=self._watch, name="gauges", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(2 * SAMPLE_SECONDS)

    def _watch(self) -> None:
        while not self._stopping.wait(SAMPLE_SECONDS):
            self.look()

    def look(self) -> None:
        """Take one reading."""
        found = self._source.read() if self._source is not None else {}
        with self._lock:
            for name, value in found.items():
                self._seen.setdefault(name, []).append(value)

    def take(self) -> list[float]:
        """This rank's columns since they were asked for last, in the order of COLUMNS; NaN for what is not known."""
        with self._lock:
            seen, self._seen = self._seen, {}
        for name, value in self._at_report().items():
            seen.setdefault(name, []).append(value)
        return [over_time(column, seen.get(name, ())) for name, column in COLUMNS.items()]


def over_time(column: Column, readings: Sequence[float]) -> float:
    """One number for all readings of a gauge; NaN for none."""
    if not readings:
        return math.nan
    if column.over_time == "last":
        return readings[-1]
    return max(readings) if column.over_time == "max" else statistics.fmean(readings)


def over_ranks(ranks: Sequence[Sequence[float]]) -> dict[str, float]:
    """Metrics from every rank's columns: NAME is the mean, NAME/min, NAME/max, and NAME/worst_rank."""
    row: dict[str, float] = {}
    if not ranks:
        return row
    for at, (name, column) in enumerate(COLUMNS.items()):
        known = {rank: values[at] for rank, values in enumerate(ranks) if math.isfinite(values[at])}
        if not known:
            continue
        pick = min if column.worst == "min" else max
        row[name] = statistics.fmean(known.values())
        row[f"{name}/min"], row[f"{name}/max"] = min(known.values()), max(known.values())
        row[f"{name}/worst_rank"] = float(pick(known, key=lambda rank: known[rank]))
    return row


def by_rank(ranks: Sequence[Sequence[float]]) -> Mapping[str, list[float | None]]:
    """Every rank's value of the columns that any has, for the file of all ranks."""
    columns = {name: [values[at] for values in ranks] for at, name in enumerate(COLUMNS)}
    return {
        name: [value if math.isfinite(value) else None for value in values]
        for name, values in columns.items()
        if any(map(math.isfinite, values))
    }


def memory(device: torch.device) -> dict[str, float]:
    """This process's memory now, and since it was asked for last the most that torch had of the GPU's, in GiB."""
    found = {}
    status = Path("/proc/self/statm")
    if status.exists():
        pages = int(status.read_text().split()[1])
        found["memory/host"] = pages * os.sysconf("SC_PAGE_SIZE") / GIB
    if device.type == "cuda":
        found["memory/allocated"] = torch.cuda.max_memory_allocated(device) / GIB
        found["memory/reserved"] = torch.cuda.max_memory_reserved(device) / GIB
    return found


def open_gauges(device: torch.device, *, warns: bool) -> Gauges:
    """The gauges of this rank; where NVML is missing, the rank that `warns` says so once."""
    source: Source | None = None
    if device.type == "cuda":
        from sora_train.monitoring.gauges_nvml import Nvml

        try:
            source = Nvml(str(torch.cuda.get_device_properties(device).uuid))
        except UserError as error:
            if warns:
                print(
                    f"no power, clocks and temperature of GPUs: {error}",
                    file=sys.stderr,
                    flush=True,
                )
    return Gauges(source, lambda: memory(device))
