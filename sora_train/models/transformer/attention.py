"""Attention: projections, QK-norm and rotary positions around a softmax core that can be replaced
from outside.

Dimension key: B batch, T latent frames, P tokens of a frame, L = T * P queries, S keys, I image tokens, N
heads, K head width, D = N * K.
"""

from typing import NamedTuple

from torch import Tensor, nn

from sora_train.config.sections.model import ModelConfig
from sora_train.errors import ConfigError
from sora_train.models.transformer.attention_backends import BACKENDS, attend
from sora_train.models.transformer.layers import Linear, RMSNorm, at_least_fp32, computes_in
from sora_train.models.transformer.rope import apply_rope


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
                f"model.attention is '{backend}', which is not known; choose one of {', '.join(BACKENDS)}"
            )
        self.backend = backend

    def forward(
        self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, key_mask_BS: Tensor | None = None
    ) -> Tensor:
        return attend(self.backend, q_BLNK, k_BSNK, v_BSNK, key_mask_BS)


class CaptionKeys(NamedTuple):
    """Keys and values of captions, as one block attends to them."""

    k_BSNK: Tensor
    v_BSNK: Tensor


class Attention(nn.Module):
    """Multi-head attention over all tokens of a clip, or from them to its caption.

    Queries and keys are RMS-normalised over the full width, before the split into heads, as in Wan
    (arXiv:2503.20314). Parameter names are those of diffusers' WanAttention. With `images` it has keys and values
    of images too, which share the queries and the output and have a softmax of their own.
    """

    def __init__(self, cfg: ModelConfig, *, images: bool = False):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.to_q = Linear(cfg.dim, cfg.dim)
        self.to_k = Linear(cfg.dim, cfg.dim)
        self.to_v = Linear(cfg.dim, cfg.dim)
        self.to_out = nn.ModuleList([Linear(cfg.dim, cfg.dim)])
        self.norm_q = RMSNorm(cfg.dim, eps=cfg.eps) if cfg.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(cfg.dim, eps=cfg.eps) if cfg.qk_norm else nn.Identity()
        self.add_k_proj = Linear(cfg.dim, cfg.dim) if images else None
        self.add_v_proj = Linear(cfg.dim, cfg.dim) if images else None
        if images:
            self.norm_added_k = RMSNorm(cfg.dim, eps=cfg.eps) if cfg.qk_norm else nn.Identity()
        self.core = AttentionCore(cfg.attention)

    def attend_self(self, x_BTPD: Tensor, table: Tensor) -> Tensor:
        """Every token to every token of the clip, with rotary positions. Returns (B, T, P, D)."""
        # Cast once, not once a projection.
        x_BTPD = x_BTPD.to(computes_in(self.to_q))
        q_BLNK = apply_rope(
            at_least_fp32(self._heads(self.norm_q(self.to_q(x_BTPD)))), table
        ).flatten(1, 2)
        k_BLNK = apply_rope(
            at_least_fp32(self._heads(self.norm_k(self.to_k(x_BTPD)))), table
        ).flatten(1, 2)
        v_BLNK = self._heads(self.to_v(x_BTPD)).flatten(1, 2)
        return self.to_out[0](self.core(q_BLNK, k_BLNK, v_BLNK).reshape(x_BTPD.shape))

    def caption_keys(self, captions_BSD: Tensor) -> "CaptionKeys":
        """What `attend_caption` makes of captions; it is the same at every noise level."""
        k_BSNK = self._heads(self.norm_k(self.to_k(captions_BSD)))
        return CaptionKeys(k_BSNK, self._heads(self.to_v(captions_BSD)))

    def attend_caption(
        self,
        x_BTPD: Tensor,
        captions: "Tensor | CaptionKeys",
        key_mask_BS: Tensor | None,
        images_BID: Tensor | None = None,
    ) -> Tensor:
        """Every token to the caption's tokens (B, S, D), and to those of images. Returns (B, T, P, D)."""
        q_BLNK = self._heads(self.norm_q(self.to_q(x_BTPD))).flatten(1, 2)
        k_BSNK, v_BSNK = self.caption_keys(captions) if isinstance(captions, Tensor) else captions
        y_BLNK = self.core(q_BLNK, k_BSNK, v_BSNK, key_mask_BS)
        if self.add_k_proj is not None and self.add_v_proj is not None:
            k_BINK = self._heads(self.norm_added_k(self.add_k_proj(images_BID)))
            v_BINK = self._heads(self.add_v_proj(images_BID))
            y_BLNK = y_BLNK + self.core(q_BLNK, k_BINK, v_BINK)
        return self.to_out[0](y_BLNK.reshape(x_BTPD.shape))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))
