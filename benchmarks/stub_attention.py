"""Attention that computes nothing and keeps what attention keeps: how long a clip fits is then known in seconds.

Attention is most of the time of a long clip and little of its memory. The stand-in is an operator of its own, so that
neither autograd nor a compiler sees into it: forward keeps queries, keys, values, the answer and a float32 number a
query and head; backward allocates the three gradients and, as flash kernels do, the queries' gradient in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sora_train.models.transformer import attention
from sora_train.parallel.memory import activations


@torch.library.custom_op("sora_bench::attention", mutates_args=())
def stub(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(q_BLNK), q_BLNK.new_zeros(q_BLNK.shape[:3], dtype=torch.float32)


@stub.register_fake
def _(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_BLNK), q_BLNK.new_empty(q_BLNK.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sora_bench::attention_backward", mutates_args=())
def stub_backward(
    grad: Tensor, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, y_BLNK: Tensor, sums_BLN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    scratch = torch.zeros_like(q_BLNK, dtype=torch.float32)
    return scratch.to(q_BLNK.dtype), torch.zeros_like(k_BSNK), torch.zeros_like(v_BSNK)


@stub_backward.register_fake
def _(
    grad: Tensor, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, y_BLNK: Tensor, sums_BLN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q_BLNK), torch.empty_like(k_BSNK), torch.empty_like(v_BSNK)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, of_sums: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = stub_backward(grad, *ctx.saved_tensors)
    return gradients


stub.register_autograd(_backward, setup_context=_keep)


@contextmanager
def stubbed() -> Iterator[None]:
    """Inside the block, models attend by the stand-in, which `selective` checkpointing takes for attention."""
    attend, kept = attention.attend, activations.OPERATORS["attention"]

    def stand_in(
        backend: str, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, key_mask_BS: Tensor | None
    ) -> Tensor:
        y_BLNK: Tensor = stub(q_BLNK.to(v_BSNK.dtype), k_BSNK.to(v_BSNK.dtype), v_BSNK)[0]
        return y_BLNK

    attention.attend = stand_in
    activations.OPERATORS["attention"] = (*kept, "sora_bench::attention")
    try:
        yield
    finally:
        attention.attend, activations.OPERATORS["attention"] = attend, kept
