"""What is timed to choose the kernels of a CPU: one attention, and one linear layer, forward and backward."""

from collections.abc import Callable

import torch
from torch import Tensor

from sora_train.models.transformer.attention_backends import attend
from sora_train.models.transformer.cpu_kernels import ShapeClass
from sora_train.models.transformer.layers import linear


def step_of(part: str, shape: ShapeClass) -> Callable[[], object]:
    """`attention` or `linear` in bfloat16 on random numbers, as `cpu_kernels.choose` asks for it."""
    draws = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=draws).bfloat16().requires_grad_()

    # The width of all heads is not among what is measured; those that are say as much.
    dim = shape.num_heads * shape.head_dim
    forward: Callable[..., Tensor]
    if part == "attention":
        size = shape.clips, shape.tokens, shape.num_heads, shape.head_dim
        inputs, forward = [normal(*size) for _ in "qkv"], _attention
    else:
        tokens = shape.clips * shape.tokens
        inputs, forward = [normal(tokens, dim), normal(shape.ffn_dim, dim)], _linear
    cotangent = torch.randn(forward(*inputs).shape, generator=draws).bfloat16()
    return lambda: torch.autograd.grad(forward(*inputs), inputs, cotangent)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend("auto", q, k, v, None)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x, weight, None)
