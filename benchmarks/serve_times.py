"""Times of calls to `sora serve` by the clients and by the histograms of the servers, and whose CPU time they cost."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serve_fleet import Fleet, children

QUIET = ("retrieve", "content", "list", "delete")
"""Calls that generate nothing."""


def at(values: Sequence[float], share: float) -> float:
    """The value below which this share of the sorted values lies."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def calls_row(calls: list[tuple[str, int, float]]) -> dict[str, Any]:
    """Milliseconds by kind of call, and the answers by status."""
    kinds: dict[str, list[float]] = {"quiet": []}
    for what, _, seconds in calls:
        kinds.setdefault(what, []).append(seconds)
        if what in QUIET:
            kinds["quiet"].append(seconds)
    told = {}
    for what, values in kinds.items():
        values.sort()
        told[what] = {"calls": len(values)} | {
            name: round(1000 * at(values, share), 1)
            for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("most", 1.0))
        }
    return {"ms": told, "statuses": dict(Counter(str(status) for _, status, _ in calls))}


def server_row(pages: list[str]) -> dict[str, Any]:
    """Of the calls that generate nothing, by the histograms of the servers: p50 and p99, even within a bucket."""
    counts: Counter[float] = Counter()
    for line in "\n".join(pages).splitlines():
        if not line.startswith("sora_request_seconds_bucket{") or "/v1/videos" not in line:
            continue
        labels, _, value = line.rpartition(" ")
        named = dict(part.split("=", 1) for part in labels[labels.index("{") + 1 : -1].split(","))
        if named["method"] != '"POST"':
            counts[float(named["le"].strip('"').replace("+Inf", "inf"))] += float(value)
    total = counts[float("inf")]
    return {"calls": int(total)} | {
        name: round(1000 * _quantile(counts, share * total), 1)
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }


def _quantile(counts: Counter[float], wanted: float) -> float:
    low, below = 0.0, 0.0
    for bound in sorted(counts):
        if counts[bound] >= wanted and counts[bound] > below:
            return low + (bound - low) * (wanted - below) / (counts[bound] - below)
        low, below = bound, counts[bound]
    return low


def cpu_seconds(fleet: Fleet) -> dict[str, float]:
    """Of the gateways, their workers, and this process."""
    took = os.times()
    gateways = [gateway.pid for gateway in fleet.gateways]
    return {
        "gateways": sum(map(_cpu, gateways)),
        "workers": sum(map(_cpu, fleet.gateway_workers())),
        "clients": took.user + took.system,
    } | ({"database": _cpu_of_postgres(fleet.postgres)} if fleet.postgres else {})


def _cpu(pid: int) -> float:
    """User and system time of a process, and of its children that are gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _cpu_of_postgres(server: Any) -> float:
    first = int((server.data / "postmaster.pid").read_text().split()[0])
    return sum(map(_cpu, (first, *children(first))))


def machine_seconds() -> float:
    """CPU time that anybody used."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
