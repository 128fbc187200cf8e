"""torch.compile of the blocks, from outside the model: one graph for each kind of block, and no way
back to eager unseen.

Blocks of one kind run one compiled function, so a model of 40 layers compiles as long as one of 2.
With `dynamic` sizes are symbols and the first clips of a run are warm-up for all others, but for
sizes of 1 (a single clip, a single frame), which the compiler always treats on their own.
"""

import importlib.util
import os
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from sora_train.errors import ConfigError
from sora_train.parallel.parallelize import sharding_units

MAX_GRAPHS = {"dynamic": 32, "static": 512}
"""Graphs of one function before it is a fault: with and without gradients, with and without a caption
mask, sizes of 1 or more; for `static` times the clip sizes."""


def check_compiler(mode: str, device: torch.device) -> None:
    """Raises ConfigError if `model.compile` asks for a compiler that this machine lacks."""
    if mode == "off":
        return
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                f"model.compile={mode} needs the package triton on a GPU; install it or set model.compile=off"
            )
        return
    found = [name for name in (os.environ.get("CXX", ""), "g++", "clang++") if name]
    if not any(map(shutil.which, found)):
        raise ConfigError(
            f"model.compile={mode} needs a C++ compiler on a CPU and none of {', '.join(found)} is installed; "
            "install one or set model.compile=off"
        )


def compile_blocks(model: nn.Module, mode: str) -> None:
    """Let every block of `model` run compiled, in place; names of parameters stay. `off` does nothing.

    Whatever cannot be compiled as one graph raises, here and later; so does a function that is
    compiled again and again.
    """
    if mode == "off":
        return
    torch._dynamo.config.suppress_errors = False
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = MAX_GRAPHS[mode]
    # Else two clips of two frames would compile for batches as large as their number of frames only.
    torch.fx.experimental._config.use_duck_shape = False
    compiled: dict[type, Callable[..., Any]] = {}
    for block in sharding_units(model):
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, fullgraph=True, dynamic=mode == "dynamic")
        # The instance's own forward: hooks of engines around it stay outside the graph.
        block.forward = types.MethodType(_of_no_view(compiled[kind]), block)


def _of_no_view(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, its tokens never a view: those of the first block are one and the others' are not, which
    would make two graphs of one."""

    def forward(block: nn.Module, x: Tensor, *rest: Any) -> Any:
        return compiled(block, x.clone() if x._is_view() else x, *rest)

    return forward


def graphs_compiled() -> int:
    """Graphs compiled in this process so far; it stands still once a run is warm."""
    return int(counters["stats"]["unique_graphs"])
