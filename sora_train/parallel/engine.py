"""Resolves the layout of a run, checks that the engine and the machine can do it, and builds the engine."""

from dataclasses import replace

import torch
from torch import nn

from sora_train.config import Config
from sora_train.errors import ConfigError, Fault
from sora_train.models.transformer.attention_backends import prepare_attention
from sora_train.parallel.compile import check_compiler
from sora_train.parallel.context.context import apply_context_parallel, make_context_groups
from sora_train.parallel.deepspeed.engine import ZeroEngine, require_deepspeed
from sora_train.parallel.deepspeed.settings import check_zero
from sora_train.parallel.degrees import Degrees, check_degrees, resolve_degrees
from sora_train.parallel.fsdp import FsdpEngine
from sora_train.parallel.layout import Layout
from sora_train.parallel.memory.float8 import check_float8
from sora_train.parallel.protocol import Engine, OptimizerBuilder, resolve_param_dtype
from sora_train.runtime.world import World


def resolve_layout(cfg: Config, world: World) -> tuple[World, Layout]:
    """The layout of `parallel.*` over these ranks, and the world that knows how many of them share a micro-batch.

    A collective where tokens are divided, since process groups are made.

    Raises:
        ConfigError: the degrees, the engine or a kernel do not fit the ranks, the model or the machine.
    """
    degrees = resolve_degrees(cfg.parallel, world.size)
    check_degrees(cfg, degrees)
    param_dtype = resolve_param_dtype(cfg.parallel.param_dtype, world.device)
    check_engine(cfg, degrees, param_dtype)
    prepare_kernels(cfg, param_dtype, world.device)
    layout = Layout(degrees, param_dtype, make_context_groups(degrees, world))
    return replace(world, cp=degrees.cp), layout


def build_engine(
    model: nn.Module, cfg: Config, world: World, layout: Layout, build_optimizer: OptimizerBuilder
) -> Engine:
    """The engine that `parallel.engine` names.

    Raises:
        Fault: an optimizer keeps state in less than float32.
    """
    apply_context_parallel(model, layout.degrees, layout.context)
    kind = FsdpEngine if cfg.parallel.engine == "fsdp" else ZeroEngine
    engine: Engine = kind(model, cfg, world, layout, build_optimizer)
    require_precise(engine)
    return engine


def require_precise(engine: Engine) -> None:
    """Raises Fault naming the first master or moment that is kept in less than float32, and is not coded: a code has
    its scale beside it."""
    for what, state in (("weight", engine.model_state()), ("state", engine.optimizer_state())):
        for name, tensor in state.items():
            coded = tensor.dtype == torch.uint8 and f"{name}_scale" in state
            if torch.promote_types(tensor.dtype, torch.float32) != tensor.dtype and not coded:
                raise Fault(
                    f"the optimizer's {what} of {name} is kept in {tensor.dtype}, where small updates are lost; "
                    "masters and moments are float32, so build the model and its optimizer in that"
                )


def check_engine(cfg: Config, degrees: Degrees, param_dtype: torch.dtype) -> None:
    """Raises ConfigError where the engine cannot do what is asked, or its package is missing."""
    parallel = cfg.parallel
    check_optimizer(cfg)
    check_base(cfg, degrees)
    if parallel.engine != "fsdp":
        require_deepspeed(parallel.engine)
        check_zero(cfg, degrees, param_dtype)
        return
    if parallel.offload_params:
        raise ConfigError(
            "parallel.offload_params=true and parallel.engine=fsdp, which keeps weights on the device; set "
            "parallel.engine=zero3, the one that can"
        )
    if parallel.deepspeed_json:
        raise ConfigError(
            f"parallel.deepspeed_json={parallel.deepspeed_json} is DeepSpeed's, and parallel.engine=fsdp is not; leave "
            "it empty, or set parallel.engine=zero1, zero2 or zero3"
        )


def check_optimizer(cfg: Config) -> None:
    """Raises ConfigError where the engine cannot do what the optimizer needs."""
    name, state, parallel = cfg.optim.name, cfg.optim.state, cfg.parallel
    if name == "muon" and parallel.engine != "fsdp":
        raise ConfigError(
            f"optim.name=muon needs rows of matrices, and parallel.engine={parallel.engine} cuts weights anywhere; set "
            "parallel.engine=fsdp, or optim.name=adamw"
        )
    if state != "float32" and parallel.engine != "fsdp":
        raise ConfigError(
            f"optim.state={state} has a scale for every part of a row, and parallel.engine={parallel.engine} cuts "
            "weights anywhere; set parallel.engine=fsdp, or optim.state=float32"
        )
    if (name in ("muon", "schedule_free") or state != "float32") and parallel.offload_optimizer:
        raise ConfigError(
            f"parallel.offload_optimizer=true and optim.name={name} with optim.state={state}, which steps on the "
            "device; set parallel.offload_optimizer=false, or optim.name=adamw and optim.state=float32"
        )


def check_base(cfg: Config, degrees: Degrees) -> None:
    """Raises ConfigError where the engine cannot hold a frozen base as `memory` asks."""
    engine, memory = cfg.parallel.engine, cfg.memory
    ranks = degrees.dp_replicate * degrees.shards
    if memory.swap_blocks and (engine != "fsdp" or ranks > 1):
        raise ConfigError(
            f"memory.swap_blocks={memory.swap_blocks} is for one rank with parallel.engine=fsdp, and here are {ranks} "
            f"with {engine}; set it to 0: parallel.dp_shard divides the base over the ranks instead"
        )
    if memory.base != "compute" and engine == "zero3":
        raise ConfigError(
            f"memory.base={memory.base} keeps frozen weights as bytes, and parallel.engine=zero3 divides weights of "
            "one floating type only; set parallel.engine=fsdp, which divides the bytes, or memory.base=compute"
        )


def prepare_kernels(cfg: Config, param_dtype: torch.dtype, device: torch.device) -> None:
    """Make the transformer's attention kernel ready. Raises ConfigError if it, the compiler or the float8 asked for is
    not here."""
    if cfg.task == "text_to_video":
        prepare_attention(cfg.model, device, param_dtype)
        check_compiler(cfg, device)
        check_float8(cfg, param_dtype, device)
