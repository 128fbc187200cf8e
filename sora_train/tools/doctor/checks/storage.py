"""A folder's file system: what it is, how much is free, how fast it writes and reads, and whether others see it.

The functions that touch it run in a process of their own (deadline.apart), since a dead file server blocks for ever.
"""

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import Any

from sora_train.tools.doctor.checks.limits import GIB, MIB, size
from sora_train.tools.doctor.findings import FAIL, WARN, Finding, info, judged

WRITTEN = 64 * MIB
PART = 4 * MIB
SECONDS = 4.0
"""Writing stops after this long, whatever was written until then."""
MEMORY = ("tmpfs", "ramfs")
LAYERED = ("overlay", "aufs")
SLOW = 50.0
TORN = "torn"


def measure(argument: dict[str, Any]) -> dict[str, Any]:
    """Kind, space and speed of the file system of `folder`, or of the nearest folder above it that is there."""
    folder = Path(argument["folder"]).absolute()
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    usage = shutil.disk_usage(place)
    facts: dict[str, Any] = {"place": str(place), "kind": kind_of(place), "free": usage.free}
    if argument.get("write"):
        facts |= _speed(place)
    return facts


def kind_of(place: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the mount that `place` lies in."""
    best, kind = -1, "unknown"
    real = Path(os.path.realpath(place))
    for line in mounts.read_text().splitlines():
        _, point, name, *_ = line.split()
        folder = Path(point.replace("\\040", " "))
        if real.is_relative_to(folder) and len(folder.parts) >= best:
            best, kind = len(folder.parts), name
    return kind


def _speed(place: Path) -> dict[str, Any]:
    """Megabytes a second written (fsync included) and read again, the page cache put aside as far as it lets."""
    path = place / f".sora-doctor-speed-{os.uname().nodename}-{os.getpid()}"
    block = os.urandom(PART)
    try:
        began, written = time.monotonic(), 0
        with path.open("wb", buffering=0) as file:
            while written < WRITTEN and time.monotonic() - began < SECONDS:
                written += file.write(block)
            before = time.monotonic()
            os.fsync(file.fileno())
            ended = time.monotonic()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        again = time.monotonic()
        with path.open("rb", buffering=0) as file:
            while file.read(PART):
                pass
        read = time.monotonic() - again
    except OSError as error:
        return {"error": error.strerror or str(error)}
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    mb = written / 1e6
    return {"write": mb / (ended - began), "fsync": ended - before, "read": mb / max(read, 1e-9)}


def judge_folder(
    name: str, facts: dict[str, Any], *, needed: float = 0.0, lasting: bool = True
) -> list[Finding]:
    """`facts` by `measure`; `needed` bytes of checkpoints lie there by the end of a run; `lasting`: what is written
    there is to be kept."""
    kind, place = facts["kind"], facts["place"]
    lost = "it is lost with the machine or container: set run.dir on storage that lasts"
    space = f"{size(facts['free'])} free" + (f", checkpoints take {size(needed)}" if needed else "")
    too_small = "lower checkpoint.keep_last, free space or set run.dir on a larger disk"
    lines = [
        judged(
            name,
            f"{place} ({kind})",
            (lasting and kind in MEMORY, WARN, f"this is memory: {lost}"),
            (lasting and kind in LAYERED, WARN, f"this is a container's own layer: {lost}"),
        ),
        judged(
            f"{name}: space",
            space,
            (facts["free"] < needed, FAIL, too_small),
            (facts["free"] < GIB, WARN, "free space, or take another folder"),
        ),
    ]
    if "error" in facts:
        remedy = (
            f"{place} must be writable by this user on every node: check owner, quota and mount"
        )
        lines.append(Finding(f"{name}: writing", facts["error"], FAIL, remedy))
    elif "write" in facts:
        value = f"{facts['write']:,.0f} MB/s, fsync {facts['fsync']:.2f} s; reading {facts['read']:,.0f} MB/s"
        slow = "checkpoints hold up the run: ask for a faster file system, or write less often (checkpoint.every)"
        lines.append(judged(f"{name}: writing", value, (facts["write"] < SLOW, WARN, slow)))
    return lines


def source_reached(argument: dict[str, Any]) -> list[str]:
    """Why each of the sources cannot be read, empty strings for those that can."""
    return [_reached(source) for source in argument["sources"]]


def _reached(source: str) -> str:
    from sora_train.data.storage.remote import expand, is_remote, size_of

    if not is_remote(source):
        path = Path(source)
        if path.is_dir():
            return "" if next(path.iterdir(), None) else "an empty folder"
        return "" if path.exists() or expand(source) != [source] else "there is no such file"
    try:
        names = expand(source)
        if not names:
            return "nothing matches"
        size_of(names[0])
    except Exception as error:
        return " ".join(str(error).split())
    return ""


def judge_sources(sources: list[str], problems: list[str]) -> list[Finding]:
    remedy = "it must be readable on every node under this name: check the mount, the credentials and data.source"
    return [
        judged(f"data {source}", why or "can be read", (bool(why), FAIL, remedy))
        for source, why in zip(sources, problems, strict=True)
    ]


# -- seen by all nodes ----------------------------------------------------------------------------


def content(version: int) -> bytes:
    """The bytes of the token file: enough that a reader could meet half of it."""
    return f"{version:08d}".encode() * 16_384


def write_versions(argument: dict[str, Any]) -> None:
    """Write version 0 of the token, and replace it at once by 1, 2, ... `versions`."""
    path = Path(argument["path"])
    path.parent.mkdir(exist_ok=True)
    for version in range(argument["first"], argument["versions"] + 1):
        temporary = path.with_name(f"{path.name}.tmp")
        with temporary.open("wb") as file:
            file.write(content(version))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        time.sleep(argument.get("pause", 0.0))


def await_version(argument: dict[str, Any]) -> dict[str, Any]:
    """Read the token until it is of `version`, at most `seconds` long: how long that took, and whether a reader met
    a file that was not whole."""
    path, version = Path(argument["path"]), argument["version"]
    began, torn, seen = time.monotonic(), 0, -1
    while True:
        with contextlib.suppress(OSError):
            held = path.read_bytes()
            if held[:8].isdigit() and held == content(int(held[:8])):
                seen = int(held[:8])
            else:
                torn += 1
        waited = time.monotonic() - began
        if seen >= version or waited > argument["seconds"]:
            return {"seen": seen, "waited": waited, TORN: torn}
        time.sleep(0.02)


def remove(argument: dict[str, Any]) -> None:
    shutil.rmtree(Path(argument["path"]).parent, ignore_errors=True)


def judge_shared(
    name: str, first: dict[str, Any], last: dict[str, Any], patience: float
) -> list[Finding]:
    """`first`: `await_version` of a new file, `last`: of its last version."""
    if first["seen"] < 0:
        remedy = (
            "run.dir must lie on storage that all nodes share, mounted at the same path: checkpoints and the frozen "
            "configuration are read from there by every rank"
        )
        value = f"node 0's file is not seen here within {patience:g} s"
        return [Finding(name, value, FAIL, remedy)]
    lag = max(first["waited"], last["waited"])
    stale = last["seen"] < 1
    state = (
        "old content is still seen here" if stale else f"node 0's file is seen after {lag:.1f} s"
    )
    cache = "it shows old content: mount with a shorter attribute cache (NFS: actimeo=3, lookupcache=positive)"
    torn = first[TORN] + last[TORN]
    value = f"{torn} times half a file" if torn else "no half file seen"
    half = "a rename is not atomic on this file system: take another for run.dir, a reader may meet half a file"
    return [
        judged(name, state, (stale or lag > 5, WARN, cache)),
        judged(f"{name}: renaming", value, (torn > 0, FAIL, half)),
    ]


def judge_caches(environ: dict[str, str]) -> list[Finding]:
    home = environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    offline = environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
    hub = Path(environ.get("HF_HUB_CACHE") or f"{home}/hub")
    models = [path.name for path in hub.glob("models--*")] if hub.is_dir() else []
    value = f"{hub}: {len(models)} model(s)" + (", offline" if offline else "")
    return [info("Hugging Face cache", value)]
