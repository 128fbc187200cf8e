"""Which code and machine made a run: the commit, what was changed since, a digest of the package, the CPU."""

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def code_digest() -> dict[str, str]:
    """`package`: SHA-256 of all source files; in a checkout `commit`, and `diff`, SHA-256 of what was changed since,
    empty where nothing was."""
    digest = {"package": package_digest(PACKAGE)}
    head = _git("rev-parse", "HEAD")
    if head is None:
        return digest
    diff = _git("diff", "HEAD", "--binary")
    changed = hashlib.sha256(diff).hexdigest() if diff else ""
    return digest | {"commit": head.decode().strip(), "diff": changed}


@cache
def code_version() -> dict[str, str]:
    """`package`: the installed version; `commit`: that of the checkout it runs from. Empty where there is none."""
    try:
        package = version("sora_train")
    except PackageNotFoundError:
        package = ""
    return {"package": package, "commit": commit()}


def commit() -> str:
    """The commit of the checkout this package runs from, `-dirty` if files changed since; empty outside one."""
    described = _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return described.decode().strip() if described else ""


def package_digest(package: Path) -> str:
    """SHA-256 over the names and bytes of all source files below a folder."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _git(*arguments: str) -> bytes | None:
    """What git says in the checkout the package runs from; None where there is none."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def cpu_model() -> str:
    """The processor's name, as far as the system knows it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
