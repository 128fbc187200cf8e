"""What must be equal on all nodes: libraries, code and configuration; and which node differs."""

import platform
from collections import Counter
from importlib.metadata import PackageNotFoundError, version

from sora_train.base.code_version import PACKAGE, cpu_model, package_digest
from sora_train.tools.doctor.findings import FAIL, INFO, WARN, Finding, Verdict, info

LIBRARIES = (
    "torch",
    "deepspeed",
    "flash-attn",
    "diffusers",
    "transformers",
    "numpy",
    "sora_train",
)
GRAVE = ("torch", "CUDA", "NCCL", "code", "config", "run.dir", "sora_train", "deepspeed")
"""Another one of these trains another model, hangs, or reads another file."""
HARMLESS = ("kernel", "machine")
DIGITS = 12


def read(_argument: object = None) -> dict[str, str]:
    """Versions and digests of this node, but for those that only torch knows."""
    values = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": cpu_model(),
    }
    for library in LIBRARIES:
        try:
            values[library] = version(library)
        except PackageNotFoundError:
            values[library] = "absent"
    return values | {"code": package_digest(PACKAGE)[:DIGITS]}


def of_torch() -> dict[str, str]:
    import torch

    values = {"CUDA": str(torch.version.cuda or "none")}
    if torch.version.cuda and torch.distributed.is_nccl_available():
        values["NCCL"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return values


def judge(values: dict[str, str]) -> list[Finding]:
    """One line, for the table of a node."""
    digests = {name: values[name] for name in ("code", "config") if values.get(name)}
    rest = [
        f"{name} {value}" for name, value in values.items() if name not in (*digests, "run.dir")
    ]
    return [
        info("versions", ", ".join(rest)),
        info("digests", ", ".join(f"{name} {value}" for name, value in digests.items())),
    ]


def odd_ones_out(values: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The most frequent value, on a tie the first node's, and the nodes that have another."""
    if not values:
        return "", {}
    counts = Counter(values.values())
    first = next(iter(values.values()))
    usual = max(counts, key=lambda value: (counts[value], value == first))
    return usual, {node: value for node, value in values.items() if value != usual}


def compare(nodes: dict[str, dict[str, str]]) -> list[Finding]:
    """A line for each value that is not the same on all nodes; one line where all are."""
    keys = dict.fromkeys(key for values in nodes.values() for key in values)
    lines = []
    for key in keys:
        usual, odd = odd_ones_out(
            {node: values.get(key, "absent") for node, values in nodes.items()}
        )
        if odd:
            lines.append(_difference(key, usual, odd))
    if not any(line.verdict.wrong for line in lines):
        text = f"versions, code and configuration are the same on {len(nodes)} node(s)"
        lines.insert(0, Finding("nodes", text))
    return lines


def _difference(key: str, usual: str, odd: dict[str, str]) -> Finding:
    others = ", ".join(f"{node} has {value}" for node, value in sorted(odd.items())[:8])
    others += f", and {len(odd) - 8} more" if len(odd) > 8 else ""
    verdict: Verdict = FAIL if key in GRAVE else INFO if key in HARMLESS else WARN
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
    return Finding(key, f"{usual} on most; {others}", verdict, "" if verdict is INFO else remedy)
