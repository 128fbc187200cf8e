"""Attention for CPUs whose bfloat16 products are fast: PyTorch's kernel forward, plain matrix products backward.

PyTorch's CPU kernel reaches half the rate of such products in its backward pass. Here scores are made again tile by
tile as products of narrow numbers. A weight is exp(q k + bias - lse), with the log-sum-exp that forward kept, and
the gradient of a score is weight * (dy v - dy y) (Dao 2023, arXiv:2307.08691, section 3.1.2): what is
subtracted rides in the products, as further channels of queries and cotangents that meet ones. So a
product's rounding is relative to the logarithm of a weight and not to the score, and only an exponential
and a multiplication are left between the products.

Both passes are custom operators: a compiler takes each as one step, whatever the number of tiles.

Dimension key: B batch, N heads, L queries, S keys, K head width.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sora_train.models.transformer.layers import at_least_fp32

TILE = 512
"""Queries and keys of one tile."""
MAX_SCORES = 1 << 21
"""Scores of one tile over the heads that go together: 4 MiB in bfloat16."""
FULLY_MASKED = -1e30
"""Stands for -inf among channels that are multiplied."""


def gemm_attention(
    q_BNLK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, bias_B11S: Tensor | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(K) + bias) V in the dtype of V, on a CPU; the softmax in at least float32.

    Queries and keys may be more precise than values; their gradients come back as they are. The
    bias is 0 or -inf and gets no gradient.
    """
    dtype = v_BNSK.dtype
    # Scaled before it is narrowed, so that a float32 q is rounded once.
    scaled = (at_least_fp32(q_BNLK) * (1.0 / math.sqrt(q_BNLK.shape[-1]))).to(dtype)
    bias = None if bias_B11S is None else bias_B11S.to(dtype)
    y_BNLK: Tensor = torch.ops.sora.gemm_attention(scaled, k_BNSK.to(dtype), v_BNSK, bias)[0]
    return y_BNLK


@torch.library.custom_op("sora::gemm_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of every query, (B, N, L) in at least float32."""
    y, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, attn_mask=bias, scale=1.0
    )
    return _as_tokens(y), lse.contiguous()


@torch.library.custom_op("sora::gemm_attention_backward", mutates_args=())
def _backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads, length, _), keys = q.shape, k.shape[2]
    # Powers of 2 move half of the logarithm of a weight that is equal for all keys out of the exponential, where
    # narrow numbers are dense, into the cotangent.
    shift = math.log2(max(keys, 1)) // 2
    dots = (at_least_fp32(dy) * at_least_fp32(y)).sum(-1) * 2.0**-shift
    dy = dy * 2.0**-shift
    ones = lse.new_ones(batch, heads, keys, 2, dtype=k.dtype)
    masked = None if bias is None else bias.clamp_min(FULLY_MASKED).mT.expand(batch, heads, -1, 1)
    one = [] if masked is None else [torch.ones_like(q[..., :1])]
    sides = (
        torch.cat([q, _split(shift * math.log(2) - lse, q.dtype), *one], -1),
        torch.cat([dy, _split(-dots, q.dtype)], -1),
        torch.cat([k, ones, *([] if masked is None else [masked])], -1),
        torch.cat([v, ones], -1),
    )
    flat = [x.flatten(0, 1) for x in (*sides, q, dy, k)]
    together = max(1, MAX_SCORES // (min(TILE, length) * min(TILE, keys)))
    parts = [
        _backward_of_heads(*some) for some in zip(*(x.split(together) for x in flat), strict=True)
    ]
    dq, dk, dv = (torch.cat(one).unflatten(0, (batch, heads)) for one in zip(*parts, strict=True))
    return tuple(_as_tokens(x.to(q.dtype)) for x in (dq, dk, dv))


def _backward_of_heads(
    q_wide: Tensor,
    dy_wide: Tensor,
    k_wide: Tensor,
    v_wide: Tensor,
    q: Tensor,
    dy: Tensor,
    k: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in at least float32 of heads (N, L, K). The wide ones have the further channels."""
    q_wide, dy_wide, k_wide, v_wide, q, dy, k = (
        _tiles(x) for x in (q_wide, dy_wide, k_wide, v_wide, q, dy, k)
    )
    dq = [torch.zeros_like(at_least_fp32(x)) for x in q]
    dk, dv = ([torch.zeros_like(at_least_fp32(x)) for x in k] for _ in "kv")
    weights, scores = (q[0].new_empty(len(q[0]) * k[0].shape[1] * q[0].shape[1]) for _ in range(2))
    for row in range(len(k)):
        for column in range(len(q)):
            shape = (len(q[0]), k[row].shape[1], q[column].shape[1])
            weight, score = (x[: math.prod(shape)].view(shape) for x in (weights, scores))
            torch.bmm(k_wide[row], q_wide[column].mT, out=weight).exp_()
            dv[row] += torch.bmm(weight, dy[column])
            torch.bmm(v_wide[row], dy_wide[column].mT, out=score).mul_(weight)
            dk[row] += torch.bmm(score, q[column])
            dq[column] += torch.bmm(score.mT, k[row])
    return torch.cat(dq, 1), torch.cat(dk, 1), torch.cat(dv, 1)


def _split(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., 2): `x` as a sum of two numbers of `dtype`."""
    high = x.to(dtype)
    return torch.stack([high, (x - high.to(x.dtype)).to(dtype)], -1)


def _tiles(x: Tensor) -> list[Tensor]:
    """Parts of equal length. Each lies in one piece: a batched product would otherwise copy it every time."""
    length = x.shape[1]
    size = -(-length // -(-length // TILE))
    return [part.contiguous() for part in x.split(size, 1)]


def _as_tokens(x: Tensor) -> Tensor:
    """(B, N, L, K) that lies in memory as (B, L, N, K): heads are split and joined again without a copy."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty(like: Tensor) -> Tensor:
    batch, heads, length, width = like.shape
    return like.new_empty((batch, length, heads, width)).transpose(1, 2)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return _empty(q), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


@_backward.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v)


def _setup(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, bias = inputs
    ctx.save_for_backward(q, k, v, *output, bias)


def _gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
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
