"""The commands that start a server on an exported folder: those of vLLM-Omni 0.30 and of SGLang 0.5.23."""

import shlex
from pathlib import Path

PORTS = {"vllm": 8091, "sglang": 30000}


def serve_commands(folder: Path) -> list[str]:
    """A line for each; the served name is what requests call the model, in place of the folder's path."""
    place, name = shlex.quote(str(folder.absolute())), shlex.quote(folder.absolute().name)
    also = f"--host 127.0.0.1 --served-model-name {name}"
    return [
        f"serve: vllm serve {place} --omni --port {PORTS['vllm']} {also}",
        f"   or: sglang serve --model-path {place} --port {PORTS['sglang']} {also}",
    ]
