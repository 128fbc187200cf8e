"""Attention of plain matrix products with a backward of its own: what fused kernels do on GPUs, for CPUs.

Queries go through in chunks whose scores fit the cache, forward and backward; scores are made again
in backward instead of being kept, so memory is linear in the tokens. PyTorch's own CPU kernel is
several times slower in bfloat16. Both passes are custom operators: a compiler takes each as one
step, whatever the number of chunks.

Dimension key: B batch, N heads, L queries, S keys, K head width.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sora_train.models.transformer.layers import at_least_fp32, multiplied_wide

MAX_SCORES = 1 << 21
"""Scores of one chunk of queries over all heads and clips: 8 MiB in float32."""


def work_dtype(x: Tensor) -> torch.dtype:
    """Precision of the matrix products for values `x`."""
    return torch.float32 if multiplied_wide(x) else x.dtype


def gemm_attention(
    q_BNLK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, bias_B11S: Tensor | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(K) + bias) V in the dtype of V; the softmax in at least float32.

    Queries and keys may be more precise than values; their gradients come back as they are. The
    bias gets none.
    """
    y_BNLK: Tensor = torch.ops.sora.gemm_attention(q_BNLK, k_BNSK, v_BNSK, bias_B11S)
    return y_BNLK


@torch.library.custom_op("sora::gemm_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    work = work_dtype(v)
    y = _empty(q, v.dtype)
    keys, values = _packed(k, work).transpose(-1, -2), _packed(v, work)
    for rows in _chunks(q, k):
        weights = _weights(_scaled(q[:, :, rows], work), keys, bias)
        y[:, :, rows] = weights.to(work) @ values
    return y


@torch.library.custom_op("sora::gemm_attention_backward", mutates_args=())
def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    work = work_dtype(v)
    sums = torch.promote_types(work, torch.float32)
    dq, dk, dv = _empty(q, q.dtype), _empty(k, k.dtype), _empty(v, v.dtype)
    dk_sum, dv_sum = (torch.zeros(x.shape, dtype=sums, device=x.device) for x in (k, v))
    keys, values = _packed(k, work), _packed(v, work).transpose(-1, -2)
    scale = 1.0 / math.sqrt(q.shape[-1])
    for rows in _chunks(q, k):
        query, cotangent = _scaled(q[:, :, rows], work), _packed(dy[:, :, rows], work)
        weights = _weights(query, keys.transpose(-1, -2), bias)
        dv_sum += weights.to(work).transpose(-1, -2) @ cotangent
        dweights = (cotangent @ values).to(weights.dtype)
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype).to(work)
        dk_sum += dscores.transpose(-1, -2) @ query
        dq[:, :, rows] = (dscores @ keys).mul_(scale)
    dk.copy_(dk_sum)
    dv.copy_(dv_sum)
    return dq, dk, dv


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An output that lies in memory as (B, L, N, K): heads are split and joined again without a copy."""
    batch, heads, length, width = like.shape
    return like.new_empty((batch, length, heads, width), dtype=dtype).transpose(1, 2)


def _packed(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def _chunks(q: Tensor, k: Tensor) -> list[slice]:
    """Slices of the queries with at most MAX_SCORES scores each."""
    batch, heads, length, _ = q.shape
    rows = max(1, MAX_SCORES // max(1, batch * heads * k.shape[2]))
    return [slice(start, min(start + rows, length)) for start in range(0, length, rows)]


def _scaled(q: Tensor, work: torch.dtype) -> Tensor:
    # In float32, so that a bfloat16 q is not rounded once more where the products are wider.
    return _packed(at_least_fp32(q) * (1.0 / math.sqrt(q.shape[-1])), work)


def _weights(query: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    scores = query @ keys
    if scores.dtype != torch.float64:
        scores = scores.float()
    if bias is not None:
        scores += bias
    return scores.softmax(dim=-1)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return _empty(q, v.dtype)


@_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q, q.dtype), _empty(k, k.dtype), _empty(v, v.dtype)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *torch.ops.sora.gemm_attention_backward(dy, *ctx.saved_tensors), None


_forward.register_autograd(_gradients, setup_context=_setup)


@register_flop_formula(torch.ops.sora.gemm_attention)
def _flops(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    """Two products; backward, which makes the scores again, counts as four by convention."""
    return 4 * math.prod(q) * k[2]


@register_flop_formula(torch.ops.sora.gemm_attention_backward)
def _backward_flops(
    dy: tuple[int, ...], q: tuple[int, ...], k: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    return 8 * math.prod(q) * k[2]
