"""Attention: projections, QK-norm and rotary positions around a softmax core that can be replaced
from outside.

Dimension key: B batch, T latent frames, P tokens of a frame, L = T * P queries, S keys, N heads, K
head width, D = N * K.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_train.config.model import ModelConfig
from sora_train.errors import ConfigError
from sora_train.models.layers import Linear, RMSNorm, at_least_fp32
from sora_train.models.rope import apply_rope

BACKENDS = ("auto", "sdpa", "gemm")
# Scores of one chunk of queries in the gemm form: 16 Mi values, 64 MiB in float32.
MAX_SCORES = 1 << 24


class AttentionCore(nn.Module):
    """softmax(Q K^T / sqrt(K)) V. Its own module so that context parallelism can wrap it in
    collectives.

    Args of forward: q (B, L, N, K), k and v (B, S, N, K), key_mask (B, S) bool or None (True =
    attend).
    Returns (B, L, N, K) in the dtype of v. A sample whose mask is all False has no defined output.
    """

    def __init__(self, backend: str = "auto"):
        super().__init__()
        if backend not in BACKENDS:
            raise ConfigError(
                f"model.attention is '{backend}', which this installation lacks; choose one of "
                f"{BACKENDS}"
            )
        self.backend = backend

    def forward(
        self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, key_mask_BS: Tensor | None = None
    ) -> Tensor:
        q_BNLK, k_BNSK, v_BNSK = (
            x.to(v_BSNK.dtype).transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK)
        )
        bias_B11S = None if key_mask_BS is None else _mask_bias(key_mask_BS, q_BNLK.dtype)
        if self._use_gemm(v_BSNK):
            y_BNLK = gemm_attention(q_BNLK, k_BNSK, v_BNSK, bias_B11S)
        else:
            y_BNLK = F.scaled_dot_product_attention(q_BNLK, k_BNSK, v_BNSK, attn_mask=bias_B11S)
        return y_BNLK.transpose(1, 2)

    def _use_gemm(self, x: Tensor) -> bool:
        """`auto` avoids SDPA only where it is several times slower than matrix products: bfloat16
        on CPUs."""
        if self.backend == "auto":
            return x.device.type == "cpu" and x.dtype == torch.bfloat16
        return self.backend == "gemm"


def _mask_bias(key_mask_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where attended, -inf elsewhere: added to the scores, (B, 1, 1, S)."""
    bias_BS = torch.zeros(key_mask_BS.shape, dtype=dtype, device=key_mask_BS.device)
    return bias_BS.masked_fill_(~key_mask_BS, float("-inf"))[:, None, None, :]


def gemm_attention(
    q_BNLK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, bias_B11S: Tensor | None
) -> Tensor:
    """Attention of plain matrix products, queries in chunks so that the scores stay small; softmax
    in at least float32."""
    scale = 1.0 / math.sqrt(q_BNLK.shape[-1])
    rows = max(1, MAX_SCORES // (k_BNSK.shape[2] * q_BNLK.shape[0] * q_BNLK.shape[1]))
    chunks = []
    for q_chunk in (q_BNLK * scale).split(rows, dim=2):
        scores = at_least_fp32(q_chunk @ k_BNSK.transpose(-1, -2))
        if bias_B11S is not None:
            scores = scores + bias_B11S
        chunks.append(scores.softmax(dim=-1).to(v_BNSK.dtype) @ v_BNSK)
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)


class Attention(nn.Module):
    """Multi-head attention over all tokens of a clip, or from them to its caption.

    Queries and keys are RMS-normalised over the full width, before the split into heads, as in Wan
    (arXiv:2503.20314). Parameter names are those of diffusers' WanAttention.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.to_q = Linear(cfg.dim, cfg.dim)
        self.to_k = Linear(cfg.dim, cfg.dim)
        self.to_v = Linear(cfg.dim, cfg.dim)
        self.to_out = nn.ModuleList([Linear(cfg.dim, cfg.dim)])
        self.norm_q = RMSNorm(cfg.dim, eps=cfg.eps) if cfg.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(cfg.dim, eps=cfg.eps) if cfg.qk_norm else nn.Identity()
        self.core = AttentionCore(cfg.attention)

    def attend_self(self, x_BTPD: Tensor, table: Tensor) -> Tensor:
        """Every token to every token of the clip, with rotary positions. Returns (B, T, P, D)."""
        # Cast once, not once a projection.
        x_BTPD = x_BTPD.to(self.to_q.weight.dtype)
        q_BLNK = apply_rope(
            at_least_fp32(self._heads(self.norm_q(self.to_q(x_BTPD)))), table
        ).flatten(1, 2)
        k_BLNK = apply_rope(
            at_least_fp32(self._heads(self.norm_k(self.to_k(x_BTPD)))), table
        ).flatten(1, 2)
        v_BLNK = self._heads(self.to_v(x_BTPD)).flatten(1, 2)
        return self.to_out[0](self.core(q_BLNK, k_BLNK, v_BLNK).reshape(x_BTPD.shape))

    def attend_caption(
        self, x_BTPD: Tensor, captions_BSD: Tensor, key_mask_BS: Tensor | None
    ) -> Tensor:
        """Every token to the caption's tokens. Returns (B, T, P, D)."""
        q_BLNK = self._heads(self.norm_q(self.to_q(x_BTPD))).flatten(1, 2)
        k_BSNK = self._heads(self.norm_k(self.to_k(captions_BSD)))
        v_BSNK = self._heads(self.to_v(captions_BSD))
        return self.to_out[0](self.core(q_BLNK, k_BSNK, v_BSNK, key_mask_BS).reshape(x_BTPD.shape))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))
