"""Readings of each rank's machine: memory, and the power, clocks, temperature and faults of its GPU.

A thread reads the GPU once a second, off the hot path. The readings travel with the report of the slowest rank
(`health.report_every`): each rank sends its columns, and the row of metrics gets their mean, minimum and maximum
and the rank where each is worst. A column that no rank has is absent.
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


class GpuReader(Protocol):
    """Reads the gauges of one GPU."""

    def read(self) -> dict[str, float]:
        """One reading by column, without those that the device does not report."""


class Gauges:
    """The gauges of one rank. `gpu` is read by a thread from `start` to `stop`."""

    def __init__(self, gpu: GpuReader | None, at_report: Callable[[], dict[str, float]]):
        self._gpu, self._at_report = gpu, at_report
        self._seen: dict[str, list[float]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._gpu is not None:
            self._thread = threading.Thread(
                target=self._sample_until_stopped, name="gauges", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(2 * SAMPLE_SECONDS)

    def _sample_until_stopped(self) -> None:
        while not self._stopping.wait(SAMPLE_SECONDS):
            self.sample()

    def sample(self) -> None:
        """Take one reading."""
        readings = self._gpu.read() if self._gpu is not None else {}
        with self._lock:
            for name, value in readings.items():
                self._seen.setdefault(name, []).append(value)

    def take(self) -> list[float]:
        """This rank's columns since the last call, in the order of COLUMNS; NaN where nothing is known."""
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
    """Memory in GiB: resident of this process now, and the most that torch has held of its GPU."""
    row = {}
    status = Path("/proc/self/statm")
    if status.exists():
        pages = int(status.read_text().split()[1])
        row["memory/host"] = pages * os.sysconf("SC_PAGE_SIZE") / GIB
    if device.type == "cuda":
        row["memory/allocated"] = torch.cuda.max_memory_allocated(device) / GIB
        row["memory/reserved"] = torch.cuda.max_memory_reserved(device) / GIB
    return row


def open_gauges(device: torch.device, *, warns: bool) -> Gauges:
    """The gauges of this rank; with `warns` a sentence is printed where NVML is missing."""
    gpu: GpuReader | None = None
    if device.type == "cuda":
        from sora_train.monitoring.gauges_nvml import Nvml

        try:
            gpu = Nvml(str(torch.cuda.get_device_properties(device).uuid))
        except UserError as error:
            if warns:
                print(
                    f"no power, clocks and temperature of GPUs: {error}",
                    file=sys.stderr,
                    flush=True,
                )
    return Gauges(gpu, lambda: memory(device))
