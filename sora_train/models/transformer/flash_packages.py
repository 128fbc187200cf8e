"""The flash-attention packages: found without importing them, imported when first used.

`flash2` is the package flash-attn, `flash3` its Hopper build flash_attn_interface, `flash4` the one in
CuTe DSL inside newer releases of flash-attn. All three take (B, L, N, K) in half precision and no
key mask.
"""

import importlib.util
from functools import cache

import torch
from torch import Tensor

MODULES = {"flash2": "flash_attn", "flash3": "flash_attn_interface", "flash4": "flash_attn.cute"}
CAPABILITY = {"flash2": (8, 0), "flash3": (9, 0), "flash4": (9, 0)}
"""Least compute capability of the GPU."""


@cache
def installed() -> tuple[str, ...]:
    """Names of the packages found here."""
    return tuple(name for name, module in MODULES.items() if _found(module))


def _found(module: str) -> bool:
    parent, _, child = module.partition(".")
    if importlib.util.find_spec(parent) is None:
        return False
    return not child or importlib.util.find_spec(module) is not None


def flash_package_attention(name: str, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(K)) V by package `name`, (B, L, N, K); repeatable where torch is told to be."""
    repeatable = torch.are_deterministic_algorithms_enabled()
    if name == "flash2":
        from flash_attn import flash_attn_func
    elif name == "flash3":
        from flash_attn_interface import flash_attn_func
    else:
        from flash_attn.cute import flash_attn_func
    found = flash_attn_func(q_BLNK, k_BSNK, v_BSNK, deterministic=repeatable)
    # Some releases return the log of the softmax's sum beside it.
    y_BLNK: Tensor = found[0] if isinstance(found, tuple) else found
    return y_BLNK
