"""Layers of the transformer and their rule of precision.

Weights may arrive in bfloat16 (FSDP2 casts them); what they meet is decided here, alike in every
engine: `Linear` casts its input to the weight's dtype, and everything that is not a large matrix
product (norms, modulation, the residual stream, the noise level's embedding) runs in at least
float32. "At least", so that a float64 model stays float64.

Dimension key: B batch, T latent frames, P tokens of a frame, L = T * P video tokens, S caption
tokens, I image tokens, D width, F sinusoid.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_train.base.seeding import key_seed
from sora_train.config.sections.model import ModelConfig
from sora_train.models.transformer.cpu_kernels import in_use

# Wan's noise levels run from 0 to 1000; ours from 0 to 1.
TIME_SCALE = 1000.0


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is that already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def multiplied_wide(x: Tensor) -> bool:
    """Whether products of `x` run in float32 although it is bfloat16: on CPUs where that was found to be
    faster."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and in_use().linear_in_float32


def work_dtype(x: Tensor) -> torch.dtype:
    """Precision of the matrix products for values `x`."""
    return torch.float32 if multiplied_wide(x) else x.dtype


class WideLinear(torch.autograd.Function):
    """A linear layer on narrow numbers whose products run in float32 (float64 for float64), forward
    and backward. Only the narrow inputs are kept, and results are narrow again."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wide = None if bias is None else at_least_fp32(bias)
        return F.linear(at_least_fp32(x), at_least_fp32(weight), wide).to(x.dtype)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        wide = at_least_fp32(dy).flatten(0, -2)
        dx = (wide @ at_least_fp32(weight)).to(x.dtype).view(x.shape)
        dweight = (wide.T @ at_least_fp32(x).flatten(0, -2)).to(weight.dtype)
        return dx, dweight, wide.sum(0).to(weight.dtype) if ctx.has_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in the dtype of the weight."""
    x = x.to(weight.dtype)
    if multiplied_wide(x):
        y: Tensor = WideLinear.apply(x, weight, bias)
        return y
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def computes_in(layer: nn.Module) -> torch.dtype:
    """The dtype in which a linear layer multiplies: that of its weight, or its own word where the weight is codes. An
    adapter around the layer has a `base_layer`."""
    base = getattr(layer, "base_layer", layer)
    dtype: torch.dtype = getattr(base, "compute_dtype", None) or base.weight.dtype
    return dtype


class PreciseLinear(nn.Linear):
    """A linear layer that computes in at least float32 even when its weight arrives in bfloat16:
    for the noise level."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.float32, self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in at least float32; the output stays there."""

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_fp32(x)
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNormOnCpu(torch.autograd.Function):
    """RMS norm over the last dimension in few passes over memory: PyTorch has no kernel for it on CPUs and
    makes it of a dozen operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        """With s the scale of a row: dx = s w dy - x s^3 mean(x w dy), dw = sum over rows of s x dy."""
        x, weight, scale = ctx.saved_tensors
        products = torch.mul(dy, x).reshape(-1, x.shape[-1])
        dots = torch.mv(products, weight).view(scale.shape)
        dweight = torch.mv(products.T, scale.flatten())
        along = dots.mul_(scale.pow(3)).div_(-x.shape[-1])
        dx = torch.mul(dy, weight, out=products.view(x.shape)).mul_(scale).addcmul_(x, along)
        return dx, dweight, None


class RMSNorm(nn.RMSNorm):
    """RMS norm (Zhang & Sennrich 2019, arXiv:1910.07467) in at least float32; the output stays
    there."""

    def forward(self, x: Tensor) -> Tensor:
        x, weight = at_least_fp32(x), self.weight.to(torch.promote_types(x.dtype, torch.float32))
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            y: Tensor = RMSNormOnCpu.apply(x, weight, self.eps)
            return y
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class GeluProjection(nn.Module):
    """Linear, then GELU. A module of its own because diffusers names the weight `ffn.net.0.proj`."""

    def __init__(self, dim: int, inner_dim: int, gelu: str):
        super().__init__()
        self.proj = Linear(dim, inner_dim)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate=self.gelu)


class FeedForward(nn.Module):
    """Two-layer MLP with GELU: `tanh` is its approximation, `none` the exact one."""

    def __init__(self, dim: int, inner_dim: int, out_dim: int, gelu: str = "tanh"):
        super().__init__()
        # Index 1 is diffusers' dropout: kept, without effect, so that the names agree.
        self.net = nn.ModuleList(
            [GeluProjection(dim, inner_dim, gelu), nn.Identity(), Linear(inner_dim, out_dim)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TextProjection(nn.Module):
    """Caption embeddings to the model width: linear, tanh-GELU, linear."""

    def __init__(self, text_dim: int, dim: int):
        super().__init__()
        self.linear_1 = Linear(text_dim, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, captions_BSE: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(captions_BSE), approximate="tanh"))


class ImageEmbedder(nn.Module):
    """Embeddings of a clip's first frame, and with `pair` of its last one, to the model width: norm, MLP, norm.

    Names, epsilon and the exact GELU are those of diffusers' WanImageEmbedding.
    """

    def __init__(self, image_dim: int, dim: int, tokens: int, *, pair: bool):
        super().__init__()
        self.norm1 = LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, image_dim, dim, gelu="none")
        self.norm2 = LayerNorm(dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 * tokens, image_dim)) if pair else None

    def forward(self, images_BIE: Tensor) -> Tensor:
        """(B, I, E) of all images of a clip, one after the other, to (B, I, D)."""
        if self.pos_embed is not None:
            images_BIE = images_BIE + at_least_fp32(self.pos_embed)
        return self.norm2(self.ff(self.norm1(images_BIE)))


class TimeEmbedder(nn.Module):
    """Sinusoid to the model width: linear, SiLU, linear."""

    def __init__(self, freq_dim: int, dim: int):
        super().__init__()
        self.linear_1 = PreciseLinear(freq_dim, dim)
        self.linear_2 = PreciseLinear(dim, dim)

    def forward(self, sinusoid_BTF: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoid_BTF)))


class ConditionEmbedder(nn.Module):
    """Noise levels, captions and images as the blocks want them. Names are those of diffusers'
    WanTimeTextImageEmbedding."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        dim = cfg.dim
        self.freq_dim = cfg.freq_dim
        self.time_embedder = TimeEmbedder(cfg.freq_dim, dim)
        self.time_proj = PreciseLinear(dim, 6 * dim)
        self.text_embedder = TextProjection(cfg.text_dim, dim)
        self.image_embedder = (
            ImageEmbedder(cfg.image_dim, dim, cfg.image_tokens, pair=cfg.image_pair)
            if cfg.image_dim
            else None
        )

    def embed_time(self, t_BT: Tensor) -> Tensor:
        """Noise levels in [0, 1], (B, T), to embeddings (B, T, D)."""
        return self.time_embedder(sinusoid(at_least_fp32(t_BT) * TIME_SCALE, self.freq_dim))

    def modulation(self, time_BTD: Tensor) -> Tensor:
        """Shift, scale and gate of both branches, shared by all blocks: (B, T, 6, D)."""
        return self.time_proj(F.silu(time_BTD)).unflatten(-1, (6, -1))


def sinusoid(x: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """cos and sin of `x` at `width / 2` frequencies, (..., width) (Vaswani et al. 2017,
    arXiv:1706.03762, section 3.5)."""
    half = width // 2
    exponents = torch.arange(half, dtype=x.dtype, device=x.device) * (-math.log(max_period) / half)
    angles = x[..., None] * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x_BTPD: Tensor, shift_BT1D: Tensor, scale_BT1D: Tensor) -> Tensor:
    """Adaptive norm (Peebles & Xie 2023, arXiv:2212.09748): x * (1 + scale) + shift, one level a
    latent frame."""
    return torch.addcmul(shift_BT1D, x_BTPD, 1 + scale_BT1D)


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """The generator of one parameter's first values: the same wherever and in whatever order it is
    asked for.

    torch takes 32 bits of the key, enough for some thousand names; with other values the random networks that
    earlier checkpoints were trained beside, frozen, could not be made again."""
    return torch.Generator().manual_seed(key_seed(seed, "init", name))


def xavier_uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Glorot & Bengio 2010, eq. 16, on the weight seen as a matrix (outputs, everything else);
    float32, on the CPU."""
    bound = math.sqrt(6.0 / (shape[0] + math.prod(shape[1:])))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
