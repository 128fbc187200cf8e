"""What must be equal on all nodes: libraries, code and configuration; and which node has something else."""

import hashlib
import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sora_train.tools.doctor.findings import FAIL, SAID, WARN, Finding, Verdict, said

LIBRARIES = (
    "torch", "deepspeed", "flash-attn", "diffusers", "transformers", "numpy", "sora_train",
)  # fmt: skip
GRAVE = ("torch", "CUDA", "NCCL", "code", "config", "run.dir", "sora_train", "deepspeed")
"""Another one of these trains another model, hangs, or reads another file."""
HARMLESS = ("kernel", "machine")


def read(argument: dict[str, Any]) -> dict[str, str]:
    """Without what only torch knows. `package` is the folder of the code."""
    found = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": cpu_name(),
    }
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "absent"
    return found | {"code": code_digest(Path(argument["package"]))}


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next(
        (line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine()
    )


def code_digest(package: Path) -> str:
    """Of names and text of all modules; twelve hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def of_torch() -> dict[str, str]:
    import torch

    found = {"CUDA": str(torch.version.cuda or "none")}
    if torch.version.cuda and torch.distributed.is_nccl_available():
        found["NCCL"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return found


def judge(found: dict[str, str]) -> list[Finding]:
    """One line, for the table of a node."""
    digests = {name: found[name] for name in ("code", "config") if found.get(name)}
    rest = [f"{name} {value}" for name, value in found.items() if name not in (*digests, "run.dir")]
    return [
        said("versions", ", ".join(rest)),
        said("digests", ", ".join(f"{name} {value}" for name, value in digests.items())),
    ]


def odd_ones_out(values: dict[str, str]) -> tuple[str, dict[str, str]]:
    """What most nodes have, and the nodes that have another; of several alike the one of the first node."""
    if not values:
        return "", {}
    counts = Counter(values.values())
    first = next(iter(values.values()))
    usual = max(counts, key=lambda value: (counts[value], value == first))
    return usual, {node: value for node, value in values.items() if value != usual}


def compare(nodes: dict[str, dict[str, str]]) -> list[Finding]:
    """A line for each thing that is not the same on all nodes; one that says so where all is."""
    keys = dict.fromkeys(key for found in nodes.values() for key in found)
    lines = []
    for key in keys:
        usual, odd = odd_ones_out({node: found.get(key, "absent") for node, found in nodes.items()})
        if odd:
            lines.append(_difference(key, usual, odd))
    if not any(line.verdict.wrong for line in lines):
        text = f"versions, code and configuration are the same on {len(nodes)} node(s)"
        lines.insert(0, Finding("nodes", text))
    return lines


def _difference(key: str, usual: str, odd: dict[str, str]) -> Finding:
    others = ", ".join(f"{node} has {value}" for node, value in sorted(odd.items())[:8])
    others += f", and {len(odd) - 8} more" if len(odd) > 8 else ""
    verdict: Verdict = FAIL if key in GRAVE else SAID if key in HARMLESS else WARN
    remedies = {
        "code": "bring the same checkout or image to all nodes, best by a file system they share",
        "config": "start all nodes from one frozen configuration (sora launch), or give all the same overrides",
        "mtu": "set the same on all nodes and on the switch between them: large packets vanish where one is smaller",
        "GPUs": "ranks wait for the slowest: ask for nodes of one kind (launch.constraint)",
        "run.dir": "give an absolute run.dir, or start all nodes in the same folder",
    }
    remedy = remedies.get(
        key, f"install the same {key} on all nodes, best from one image or environment"
    )
    return Finding(key, f"{usual} on most; {others}", verdict, "" if verdict is SAID else remedy)
