"""What a block keeps for its backward pass, chosen from outside the model; parameter names stay.

Each option replaces an instance's own `forward`, as compilation does, so no module wraps another and
the hooks of engines stay around all of it. The order is fixed, from the inside out: products in float8, the MLP in
parts, checkpointing, compilation (which sees a checkpoint as a part of its graph and can then choose what to
save), offloading (whose copies are no part of a graph), the engine's gathering of weights. What is
computed again therefore meets weights that the engine has gathered for the backward pass.

Nothing random happens in a block, so no generator's state is kept.
"""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from sora_train.config import Config
from sora_train.parallel.compile import Recompiles, compile_blocks, resolve_compile
from sora_train.parallel.memory.float8 import multiply_in_float8
from sora_train.parallel.memory.offload import Offloader, offload_blocks
from sora_train.parallel.parallelize import sharding_units

Forward = Callable[..., Any]

ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "sora::gemm_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_forward",
    "flash_attn_3::fwd",
    "flash_attn_3::_flash_attn_forward",
)
"""Operators that are an attention core as a whole. The core `math` is products and a softmax: `matmul`."""
MATMUL = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::linear",
    "aten::_scaled_mm",
    "sora::frozen_product",
)
OPERATORS = {"attention": ATTENTION, "matmul": MATMUL}


def prepare_blocks(
    model: nn.Module, cfg: Config, device: torch.device, compile: str = ""
) -> tuple[Recompiles | None, Offloader | None]:
    """Give every block of `model` the products, memory options and compilation of the config, in place, before it is
    sharded.

    `compile` stands for `model.compile` where an engine cannot do what that says.

    Returns the count of needless graphs where blocks are compiled, and what holds activations on the host
    where they are offloaded.
    """
    wanted = cfg.parallel
    if cfg.model.float8 != "off":
        multiply_in_float8(model)
    chunk_mlps(model, wanted.mlp_chunks)
    checkpoint_blocks(
        model, wanted.activation_checkpointing, wanted.checkpoint_every, wanted.checkpoint_keep
    )
    mode = resolve_compile(compile or cfg.model.compile, device)
    recompiles = compile_blocks(model, mode, wanted.activation_memory_budget)
    return recompiles, offload_blocks(model) if wanted.offload_activations else None


# -- checkpointing ----------------------------------------------------------------------------------


def checkpoint_blocks(
    model: nn.Module, mode: str, every: int = 1, keep: Sequence[str] = ("attention", "matmul")
) -> None:
    """Let every `every`-th block forget what it computed: all of it but its input (`full`), or all but the results
    that `keep` names (`selective`); `none` does nothing."""
    if mode == "none":
        return
    kept = tuple(sorted(keep)) if mode == "selective" else ()
    for block in sharding_units(model)[::every]:
        block.forward = types.MethodType(_checkpointed(block.forward.__func__, kept), block)


@functools.cache
def _checkpointed(forward: Forward, kept: tuple[str, ...]) -> Forward:
    """One function for all blocks that share `forward`, so that they are compiled once."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kept:
        names = frozenset(name for kind in kept for name in OPERATORS[kind])
        policy = functools.partial(_policy, names)
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)

    def run(block: nn.Module, *inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(block, *inputs)
        return checkpoint(forward, block, *inputs, **options)

    return run


def _policy(
    names: frozenset[str], context: Any, operator: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """Whether the result of an operator is kept."""
    name = operator.name().partition(".")[0] if hasattr(operator, "name") else ""
    return CheckpointPolicy.MUST_SAVE if name in names else CheckpointPolicy.PREFER_RECOMPUTE


# -- the MLP in parts -------------------------------------------------------------------------------


def chunk_mlps(model: nn.Module, parts: int) -> None:
    """Let every block's MLP (`ffn`, where it has one) take its tokens in `parts`; 1 does nothing.

    A part keeps its input alone and computes its inner width again in backward, so that neither pass holds
    that width for more than a part of the tokens.
    """
    if parts == 1:
        return
    for block in sharding_units(model):
        mlp = getattr(block, "ffn", None)
        if isinstance(mlp, nn.Module):
            plain = type(mlp).forward
            mlp.forward = types.MethodType(_in_parts(plain, parts), mlp)


@functools.cache
def _in_parts(forward: Forward, parts: int) -> Forward:
    def run(mlp: nn.Module, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        count = tokens.shape[0]
        bounds = [count * part // parts for part in range(parts + 1)]
        pieces = [tokens[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        if torch.is_grad_enabled():
            done = [
                checkpoint(forward, mlp, piece, use_reentrant=False, preserve_rng_state=False)
                for piece in pieces
            ]
        else:
            done = [forward(mlp, piece) for piece in pieces]
        return torch.cat(done).unflatten(0, x.shape[:-1])

    return run
