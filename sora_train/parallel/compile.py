"""torch.compile of the blocks, from outside the model: one graph for each kind of block, and no way
back to eager unseen.

Blocks of one kind run one compiled function, so a model of 40 layers compiles as long as one of 2.
With `dynamic` sizes are symbols and the first clips of a run are warm-up for all others, but for
sizes of 1 (a single clip, a single frame), which the compiler always treats on their own. Graphs
beyond these are counted (`train/recompiles`).
"""

import importlib.util
import os
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
import torch.fx.experimental._config
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
from torch._dynamo.utils import counters

from sora_train.config import Config
from sora_train.errors import ConfigError, Fault
from sora_train.parallel.parallelize import sharding_units

MAX_GRAPHS = {"dynamic": 32, "static": 512}
"""Graphs of one function before it is a fault: with and without gradients, with and without a caption
mask, sizes of 1 or more; for `static` times the clip sizes."""


def resolve_compile(mode: str, device: torch.device) -> str:
    """`auto` is `dynamic` on a GPU and `off` on a CPU, where code takes a C++ compiler and longer to make than
    most runs there gain."""
    if mode != "auto":
        return mode
    return "dynamic" if device.type == "cuda" else "off"


def check_compiler(cfg: Config, device: torch.device) -> None:
    """Raises ConfigError if `model.compile` asks for a compiler that this machine lacks, or
    `parallel.activation_memory_budget` for one that does not run."""
    mode, budget = cfg.model.compile, cfg.parallel.activation_memory_budget
    compiled = cfg.parallel.engine != "zero3" and resolve_compile(mode, device) != "off"
    if budget < 1 and not compiled:
        raise ConfigError(
            f"parallel.activation_memory_budget={budget:g} is a compiler's choice of what is kept, and blocks are not "
            f"compiled here (model.compile={mode} on {device.type}, parallel.engine={cfg.parallel.engine}); set "
            "model.compile=dynamic, or use parallel.activation_checkpointing instead"
        )
    if budget < 1 and cfg.parallel.activation_checkpointing != "none":
        raise ConfigError(
            f"parallel.activation_memory_budget={budget:g} and parallel.activation_checkpointing="
            f"{cfg.parallel.activation_checkpointing} both choose what is recomputed; set one of them"
        )
    if resolve_compile(mode, device) == "off":
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


class Recompiles:
    """How many graphs were compiled beyond those that are called for: with `dynamic` one for a kind of block, with
    gradients and without, and each pattern of sizes of 1; with `static` one for the sizes themselves.

    None is expected, from the first step on: after the warm-up over all buckets nothing compiles.
    """

    def __init__(self, mode: str):
        self.mode = mode
        self.count = 0
        self._met: set[Any] = set()

    def called(self, kind: object, inputs: tuple[Any, ...], graphs: int) -> None:
        """A block of this kind, named by its forward, ran on these inputs, for which so many graphs were compiled."""
        sizes = tuple(map(self._class_of, inputs))
        key = (kind, torch.is_grad_enabled(), sizes)
        self.count += max(0, graphs - (key not in self._met))
        self._met.add(key)

    def _class_of(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return type(value)
        # A rank whose tokens are cut may hold none.
        return tuple(value.shape if self.mode == "static" else (min(n, 2) for n in value.shape))


def compile_blocks(model: nn.Module, mode: str, memory_budget: float = 1.0) -> Recompiles | None:
    """Let every block of `model` run compiled, in place; names of parameters stay. `off` does nothing.

    `memory_budget` is the share of what a graph would keep for backward that it may keep.

    A block that cannot be compiled as one graph raises Fault when it runs; so does one that is compiled again and
    again. Returns the count of what was compiled needlessly, or None for `off`.
    """
    if mode == "off":
        return None
    torch._dynamo.config.suppress_errors = False
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._functorch.config.activation_memory_budget = memory_budget
    torch._dynamo.config.recompile_limit = MAX_GRAPHS[mode]
    # The limit over all blocks together, which is lower by default.
    torch._dynamo.config.accumulated_recompile_limit = max(1024, 4 * MAX_GRAPHS[mode])
    # Else two clips of two frames would compile for batches as large as their number of frames only.
    torch.fx.experimental._config.use_duck_shape = False
    # Else tokens that are cut over ranks, whose lengths stand as sizes of a module's tensors (context.py), would
    # compile for each clip size. Parameters stay constants.
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    recompiles = Recompiles(mode)
    compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
    for block in sharding_units(model):
        # A checkpointed block has a forward of its own, and all of those have the same.
        plain = block.forward.__func__
        if plain not in compiled:
            compiled[plain] = torch.compile(plain, fullgraph=True, dynamic=mode == "dynamic")
        # The instance's own forward: hooks of engines around it stay outside the graph.
        block.forward = types.MethodType(_counted(plain, compiled[plain], recompiles), block)
    return recompiles


def _counted(
    plain: Callable[..., Any], compiled: Callable[..., Any], recompiles: Recompiles
) -> Callable[..., Any]:
    """`compiled` of the function `plain`, its graphs counted and its failures told. Its tokens are never a view:
    those of the first block are one and the others' are not, which would make two graphs of one."""

    def forward(block: nn.Module, x: Tensor, *rest: Any) -> Any:
        before = graphs_compiled()
        try:
            found = compiled(block, x.clone() if x._is_view() else x, *rest)
        except FailOnRecompileLimitHit as error:
            raise Fault(
                f"model.compile={recompiles.mode} has compiled {type(block).__name__} for "
                f"{MAX_GRAPHS[recompiles.mode]} different inputs and would go on uncompiled; set "
                "model.compile=dynamic (or off), or have fewer sizes"
            ) from error
        except Unsupported as error:
            raise Fault(
                f"model.compile={recompiles.mode} cannot compile {type(block).__name__} as one graph: "
                f"{str(error).splitlines()[0]}; set model.compile=off or change the block"
            ) from error
        recompiles.called(plain, (x, *rest), graphs_compiled() - before)
        return found

    return forward


def graphs_compiled() -> int:
    """Graphs compiled in this process so far; it stands still once a run is warm."""
    return int(counters["stats"]["unique_graphs"])
