"""What a forward pass costs, from the sizes alone: nothing is built. A multiply and an add are two operations."""

import math

from sora_train.config.sections.model import ModelConfig, TextConfig


def transformer_flops(
    cfg: ModelConfig, num_tokens: int, text_tokens: int, num_frames: int = 1
) -> int:
    """Floating-point operations of one sample's forward pass; backward costs twice that.

    Args:
        cfg: sizes of the transformer.
        num_tokens: video tokens of the sample, L.
        text_tokens: caption tokens attended to, S.
        num_frames: latent frames, each with its own time embedding.
    """
    d, tokens, text = cfg.dim, num_tokens, text_tokens
    patch = (cfg.in_channels + cfg.velocity_channels) * math.prod(cfg.patch_size)
    self_attention = 8 * tokens * d * d + 4 * tokens * tokens * d
    cross_attention = 4 * (tokens + text) * d * d + 4 * tokens * text * d
    block = self_attention + cross_attention + 4 * tokens * d * cfg.ffn_dim
    ends = 2 * tokens * patch * d + 2 * text * (cfg.text_dim * d + d * d)
    time = 2 * num_frames * (cfg.freq_dim * d + 7 * d * d)
    return cfg.num_layers * block + ends + time


def text_flops(cfg: TextConfig, text_tokens: int) -> int:
    """Floating-point operations of one caption's forward pass; backward costs twice that."""
    inner = cfg.num_heads * cfg.d_kv
    layer = 8 * cfg.d_model * inner + 4 * text_tokens * inner + 6 * cfg.d_model * cfg.d_ff
    return cfg.num_layers * text_tokens * layer


def training_flops(
    model: ModelConfig, text: TextConfig, num_tokens: int, text_tokens: int
) -> float:
    """Forward pass of what is trained: a trainable text encoder is included, a frozen one is not."""
    total = transformer_flops(model, num_tokens, text_tokens)
    return float(total + (text_flops(text, text_tokens) if text.trainable else 0))
