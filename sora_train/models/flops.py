"""Floating-point operations of a forward and backward pass, from the sizes alone: nothing is built.

Matrix products and convolutions are counted, a multiply and an add as two operations; norms, gates and
activations are not, nor what `model.mask_channel` and `model.fps_embed` add, which is less than one part in a
thousand. Attention to every key is counted, masked keys included.
"""

import math

from sora_train.config.sections.model import ModelConfig, TextConfig

FORMULA = (
    "3 (layers (8 L D^2 + 4 (L + S) D^2 + 4 L D F + 4 L (L + S) D) + embeddings), L video tokens, S caption tokens, "
    "D width, F feed-forward width"
)
"""`training_flops` in words, for whatever prints an MFU."""


def training_flops(
    model: ModelConfig,
    text: TextConfig | None,
    num_tokens: int,
    num_frames: int,
    text_tokens: int,
    *,
    frozen: bool = False,
) -> int:
    """Operations of training on one clip: the forward pass of what is trained, and twice as much for backward.

    With a `frozen` base, beside which an adapter is trained, backward goes through the base once, and a trainable text
    encoder has no backward pass; the adapter's own products, a hundredth, are left out.

    Frozen networks and what backward computes again are left out, as MFU has it (Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B). The card, `train/tflops`, `sora plan`, `sora models` and `sora bench` all
    call this function.

    Args:
        model: sizes of the transformer.
        text: sizes of the text encoder, which counts if it is trainable; None counts the transformer alone.
        num_tokens: video tokens of the clip, L.
        num_frames: latent frames of the clip, each with its own time embedding.
        text_tokens: caption tokens attended to, S.
    """
    if frozen:
        return 2 * transformer_flops(model, num_tokens, text_tokens, num_frames)
    return 3 * trained_forward_flops(model, text, num_tokens, text_tokens, num_frames)


def trained_forward_flops(
    model: ModelConfig,
    text: TextConfig | None,
    num_tokens: int,
    text_tokens: int,
    num_frames: int = 1,
) -> int:
    """Operations of one clip's forward pass through what is trained; arguments as in `training_flops`."""
    total = transformer_flops(model, num_tokens, text_tokens, num_frames)
    return total + (text_flops(text, text_tokens) if text and text.trainable else 0)


def transformer_flops(
    cfg: ModelConfig, num_tokens: int, text_tokens: int, num_frames: int = 1
) -> int:
    """Operations of the transformer's forward pass over one clip; arguments as in `training_flops`."""
    d, tokens, text = cfg.dim, num_tokens, text_tokens
    patch = (cfg.in_channels + cfg.velocity_channels) * math.prod(cfg.patch_size)
    projections = 8 * tokens * d * d + 4 * (tokens + text) * d * d
    feed_forward = 4 * tokens * d * cfg.ffn_dim
    ends = 2 * tokens * patch * d + 2 * text * (cfg.text_dim * d + d * d)
    time = 2 * num_frames * (cfg.freq_dim * d + 7 * d * d)
    cores = attention_flops(cfg, num_tokens, text_tokens)
    return cfg.num_layers * (projections + feed_forward) + cores + ends + time + _image_flops(cfg)


def attention_flops(cfg: ModelConfig, num_tokens: int, text_tokens: int) -> int:
    """The part of `transformer_flops` in softmax(Q K^T) V, of attention to video, to caption and to image tokens."""
    keys = num_tokens + text_tokens + cfg.images * cfg.image_tokens
    return 4 * cfg.num_layers * num_tokens * keys * cfg.dim


def _image_flops(cfg: ModelConfig) -> int:
    """Image tokens to the model width, and to keys and values in every block."""
    d, width, tokens = cfg.dim, cfg.image_dim, cfg.images * cfg.image_tokens
    return tokens * (2 * width * (width + d) + 4 * cfg.num_layers * d * d)


def text_flops(cfg: TextConfig, text_tokens: int) -> int:
    """Operations of the text encoder's forward pass over one caption."""
    inner = cfg.num_heads * cfg.d_kv
    layer = 8 * cfg.d_model * inner + 4 * text_tokens * inner + 6 * cfg.d_model * cfg.d_ff
    return cfg.num_layers * text_tokens * layer
