"""What the operating system lets a rank have: files, processes, memory, cores, /dev/shm, temporary space."""

import os
import resource
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sora_train.tools.doctor.findings import FAIL, INFO, OK, WARN, Finding, judged

MIB, GIB = 2**20, 2**30
ENOUGH_FILES, ENOUGH_PROCESSES = 4096, 4096
"""A rank holds sockets to its peers, pipes to its workers and shards: some hundred each, some ranks a node."""
LOCKED = 64 * MIB
"""InfiniBand pins its buffers; with less than this NCCL falls over or back to TCP."""


@dataclass(frozen=True)
class Limits:
    """Bytes and counts; None: no limit, or not known."""

    open_files: int | None
    open_files_hard: int | None
    processes: int | None
    locked: int | None
    shm_total: int
    shm_free: int
    tmp: str
    tmp_free: int
    cores: int
    usable_cores: int
    quota_cores: float | None
    memory: int
    memory_free: int
    memory_limit: int | None
    swap_used: int


def read() -> Limits:
    """The limits of this machine and of this process."""
    files, hard = (_limit(value) for value in resource.getrlimit(resource.RLIMIT_NOFILE))
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    tmp = tempfile.gettempdir()
    memory = _meminfo(Path("/proc/meminfo").read_text())
    return Limits(
        open_files=files,
        open_files_hard=hard,
        processes=_limit(resource.getrlimit(resource.RLIMIT_NPROC)[0]),
        locked=_limit(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        shm_total=shm.total if shm else 0,
        shm_free=shm.free if shm else 0,
        tmp=tmp,
        tmp_free=shutil.disk_usage(tmp).free,
        cores=os.cpu_count() or 1,
        usable_cores=len(os.sched_getaffinity(0)),
        quota_cores=cgroup_cores(),
        memory=memory["MemTotal"],
        memory_free=memory["MemAvailable"],
        memory_limit=cgroup_memory(),
        swap_used=memory.get("SwapTotal", 0) - memory.get("SwapFree", 0),
    )


def _limit(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


def _meminfo(text: str) -> dict[str, int]:
    """Bytes, by the kernel's names."""
    pairs = (line.split(":") for line in text.splitlines() if line.rstrip().endswith("kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def cgroup_folders() -> list[Path]:
    """This process's control group (version 2), and those it lies in."""
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return [root]
    own = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = root / own.strip().lstrip("/")
    return [place for place in (folder, *folder.parents) if place.is_relative_to(root)]


def _cgroup_values(name: str) -> list[str]:
    return [
        path.read_text().strip() for place in cgroup_folders() if (path := place / name).is_file()
    ]


def cgroup_memory() -> int | None:
    """The least limit that holds for this process, None without one."""
    values = [int(value) for value in _cgroup_values("memory.max") if value.isdigit()]
    old = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")
    if not values and old.is_file():
        values = [int(old.read_text())]
    return min((value for value in values if value < 2**60), default=None)


def cgroup_cores() -> float | None:
    """Cores that this process may use by its quota of time, None without one."""
    quotas = [value.split() for value in _cgroup_values("cpu.max")]
    return min(
        (int(quota) / int(period) for quota, period in quotas if quota.isdigit()), default=None
    )


def judge(limits: Limits, *, ranks: int, workers: int, infiniband: bool) -> list[Finding]:
    """`ranks` of this node, each with `workers` decode processes (0: not known)."""
    return [
        *_counts(limits, infiniband),
        *_spaces(limits),
        _cores(limits, ranks, workers),
        *_memory(limits),
    ]


def _counts(limits: Limits, infiniband: bool) -> list[Finding]:
    few_files = limits.open_files is not None and limits.open_files < ENOUGH_FILES
    few_processes = limits.processes is not None and limits.processes < ENOUGH_PROCESSES
    little_locked = limits.locked is not None and limits.locked < LOCKED
    hard = limits.open_files_hard
    files = "ulimit -n 65536 before the ranks start (launch.setup)"
    if hard is not None and hard < ENOUGH_FILES:
        files = f"the hard limit is {hard}: raise nofile in /etc/security/limits.conf or LimitNOFILE of slurmd"
    processes = "ulimit -u 65536, or nproc in /etc/security/limits.conf; threads count too"
    locked = "InfiniBand pins its buffers: ulimit -l unlimited, LimitMEMLOCK=infinity of slurmd or dockerd"
    return [
        judged("open files", shown(limits.open_files), (few_files, WARN, files)),
        judged("processes", shown(limits.processes), (few_processes, WARN, processes)),
        judged(
            "locked memory",
            "no limit" if limits.locked is None else size(limits.locked),
            (little_locked and infiniband, FAIL, locked),
            good=OK if infiniband else INFO,
        ),
    ]


def _spaces(limits: Limits) -> list[Finding]:
    shm = f"{size(limits.shm_total)}, {size(limits.shm_free)} free"
    larger = "give the container more: docker run --shm-size=16g, --ipc=host, or a Memory emptyDir in Kubernetes"
    full = f"NCCL and loaders die there with a bus error; {larger}"
    free = "free it, or set TMPDIR to a local disk with room"
    return [
        judged(
            "/dev/shm",
            shm if limits.shm_total else "none",
            (limits.shm_free < 32 * MIB, FAIL, full),
            (limits.shm_total < GIB, WARN, larger),
        ),
        judged(
            "temporary folder",
            f"{limits.tmp}, {size(limits.tmp_free)} free",
            (limits.tmp_free < 100 * MIB, FAIL, free),
            (limits.tmp_free < GIB, WARN, free),
        ),
    ]


def _cores(limits: Limits, ranks: int, workers: int) -> Finding:
    usable = min(limits.usable_cores, limits.quota_cores or limits.usable_cores)
    needed = ranks * (1 + workers)
    value = f"{usable:g} of {limits.cores} usable, {ranks} rank(s)"
    value += f" with {workers} loader worker(s) each" if workers else ""
    shared = "ranks share cores and wait for each other: --cpus-per-task or launch.cpus, and no binding to one core"
    bound = "the scheduler bound this process to one core: --cpus-per-task or launch.cpus, or srun --cpu-bind=none"
    few = f"{needed} processes share {usable:g} cores: ask for more (launch.cpus) or lower data.num_workers"
    return judged(
        "CPU cores",
        value,
        (usable < ranks, FAIL, shared),
        (usable == 1 < limits.cores, WARN, bound),
        (usable < needed, WARN, few),
    )


def _memory(limits: Limits) -> list[Finding]:
    total = min(limits.memory, limits.memory_limit or limits.memory)
    value = f"{size(total)}, {size(limits.memory_free)} free on the machine"
    value += " (limit of the control group)" if total < limits.memory else ""
    used = "another job uses this node: see `ps aux --sort -rss`, or ask for the node alone (--exclusive)"
    swapping = "swapping ranks hold up all others: free memory, then swapoff -a"
    swapped = size(limits.swap_used) if limits.swap_used else "none"
    return [
        judged("memory", value, (limits.memory_free < 0.1 * limits.memory, WARN, used)),
        judged("swap in use", swapped, (limits.swap_used > GIB, WARN, swapping), good=INFO),
    ]


def size(number: float) -> str:
    """Bytes with a unit: `3.2 GiB`."""
    for unit, name in ((2**40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (1024, "KiB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:.0f} B"


def shown(limit: int | None) -> str:
    return "no limit" if limit is None else f"{limit:,}"
