"""Matrix products of the blocks in float8 (e4m3), one scale a row, by torchao; masters, weights and results stay.

Micikevicius et al. 2022, arXiv:2209.05433. Inputs, weights and gradients are rounded at each product, forward and
backward, by the largest value of their row, its scale rounded down to a power of two. Embeddings, norms, attention
cores and the output layer keep their precision, and parameters keep their names, so checkpoints are those of a run
without it.
"""

import logging
import sys
from dataclasses import replace
from importlib.machinery import PathFinder
from typing import Any

import torch
from torch import Tensor, nn

from sora_train.config import Config
from sora_train.errors import ConfigError
from sora_train.models.transformer.layers import Linear
from sora_train.parallel.parallelize import sharding_units

CAPABILITY = (8, 9)
"""Least compute capability of a GPU that multiplies float8. A CPU runs PyTorch's reference, slowly: for tests."""
WIDTH = 16
"""The kernels take widths that are multiples of this; numbers of tokens are padded."""


def check_float8(cfg: Config, param_dtype: torch.dtype, device: torch.device) -> None:
    """Raises ConfigError if `model.float8` asks for what the package, the machine, the engine or the model's widths
    do not give."""
    if cfg.model.float8 == "off":
        return
    asked = f"model.float8={cfg.model.float8}"
    if not is_installed():
        raise ConfigError(
            f"{asked} needs torchao: pip install 'sora_train[float8]', or set model.float8=off"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        raise ConfigError(
            f"{asked} needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]} and "
            f"{torch.cuda.get_device_name(device)} has less; set model.float8=off"
        )
    if param_dtype != torch.bfloat16:
        raise ConfigError(
            f"{asked} rounds what is bfloat16, and parallel.param_dtype={cfg.parallel.param_dtype} comes to "
            f"{str(param_dtype).removeprefix('torch.')} on {device.type}; set parallel.param_dtype=bfloat16"
        )
    if cfg.parallel.engine == "zero3":
        raise ConfigError(
            f"{asked} keeps a block's weights for backward, and parallel.engine=zero3 takes them away; set "
            "parallel.engine=fsdp, zero1 or zero2"
        )
    for name, width in (("num_heads * head_dim", cfg.model.dim), ("ffn_dim", cfg.model.ffn_dim)):
        if width % WIDTH:
            raise ConfigError(
                f"{asked} takes widths that are multiples of {WIDTH} and model.{name} is {width}; change it, or set "
                "model.float8=off"
            )


def is_installed() -> bool:
    """Whether torchao is here; it is not imported. Other finders may be told that it is not (errors.py)."""
    return PathFinder.find_spec("torchao") is not None


def multiply_in_float8(model: nn.Module) -> None:
    """Let every linear layer of `model`'s blocks multiply in float8, in place, before blocks are compiled or sharded.

    Raises ConfigError where there is none.
    """
    if sys.modules.get("torchao", torch) is None:
        del sys.modules["torchao"]
    # Kernels of its own that it does not load are not among those used here.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # Gradients of weights are sums over tokens, whose number is no multiple of anything.
    recipe = replace(Float8LinearConfig.from_recipe_name("rowwise"), pad_inner_dim=True)
    changed = 0
    for block in sharding_units(model):
        convert_to_float8_training(block, config=recipe, module_filter_fn=_is_product)
        for layer in block.modules():
            if hasattr(layer, "linear_mm_config"):
                layer.register_forward_pre_hook(_in_dtype_of_weight)
                changed += 1
    if not changed:
        raise ConfigError(
            f"model.float8=rowwise changes the layers `Linear` of blocks, and {type(model).__name__} has none; set "
            "model.float8=off"
        )


def _is_product(module: nn.Module, name: str) -> bool:
    return isinstance(module, Linear)


def _in_dtype_of_weight(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
    """What `Linear` does itself: norms and modulation hand over float32."""
    (x,) = inputs
    return (x.to(layer.weight.dtype),)
