"""The video diffusion transformer: plain modules that know nothing of ranks or meshes.

Parameter names and shapes are those of diffusers' `WanTransformer3DModel`, so open Wan weights load
and trained ones export back. `mask_proj` and `fps_proj` are optional extras; both
start at zero.

Tokens travel as (B, T, P, D): modulation is one row a latent frame and broadcasts over the frame's
tokens, and context parallelism can cut the P dimension without cutting a frame's modulation
(`enter` and `leave` mark where).

Dimension key, used as suffixes of tensor names:
  B batch    C latent channels    T, H, W latent frames, rows, columns    P tokens of a frame
  S caption tokens    I image tokens    E caption or image width    D model width
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from sora_train.config.sections.model import ModelConfig
from sora_train.errors import UserError
from sora_train.models.flops import transformer_flops
from sora_train.models.transformer.attention import Attention, CaptionKeys
from sora_train.models.transformer.layers import (
    ConditionEmbedder,
    FeedForward,
    LayerNorm,
    Linear,
    PreciseLinear,
    at_least_fp32,
    keyed_generator,
    linear,
    modulate,
    sinusoid,
    xavier_uniform,
)
from sora_train.models.transformer.rope import check_positions, rope_table


class PatchEmbedding(nn.Conv3d):
    """Patches to tokens. The weight is a convolution's (that is its name and shape in Wan); the
    work is one matrix product."""

    def __init__(
        self, channels: int, dim: int, patch_size: tuple[int, int, int], *, bias: bool = True
    ):
        super().__init__(channels, dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """(B, C, T, H, W) to (B, T, P, D)."""
        _, p, q = self.kernel_size
        patches = rearrange(x_BCTHW, "B C T (h p) (w q) -> B T (h w) (C p q)", p=p, q=q)
        return linear(patches, self.weight.flatten(1), self.bias)


class Block(nn.Module):
    """Self-attention, attention to the caption and to images, and an MLP; the first and last are shifted,
    scaled and gated by noise level."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm1 = LayerNorm(cfg.dim, cfg.eps, elementwise_affine=False)
        self.attn1 = Attention(cfg)
        self.attn2 = Attention(cfg, images=cfg.image_dim > 0)
        self.norm2 = LayerNorm(cfg.dim, cfg.eps, elementwise_affine=True)
        self.ffn = FeedForward(cfg.dim, cfg.ffn_dim, cfg.dim)
        self.norm3 = LayerNorm(cfg.dim, cfg.eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, cfg.dim))

    def forward(
        self,
        x_BTPD: Tensor,
        captions: Tensor | CaptionKeys,
        modulation_BT6D: Tensor,
        table: Tensor,
        key_mask_BS: Tensor | None,
        images_BID: Tensor | None = None,
    ) -> Tensor:
        rows = (at_least_fp32(self.scale_shift_table) + modulation_BT6D).unsqueeze(3)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = rows.unbind(2)

        h_BTPD = modulate(self.norm1(x_BTPD), shift_a, scale_a)
        x_BTPD = torch.addcmul(x_BTPD, at_least_fp32(self.attn1.attend_self(h_BTPD, table)), gate_a)
        x_BTPD = x_BTPD + self.attn2.attend_caption(
            self.norm2(x_BTPD), captions, key_mask_BS, images_BID
        )
        h_BTPD = modulate(self.norm3(x_BTPD), shift_f, scale_f)
        return torch.addcmul(x_BTPD, at_least_fp32(self.ffn(h_BTPD)), gate_f)


class KnownCaptions(NamedTuple):
    """Captions as the blocks attend to them: two tensors a block in place of one."""

    each_block: tuple[CaptionKeys, ...]


class VideoDiT(nn.Module):
    """Predicts the velocity of noisy latents, given a noise level for each latent frame and caption
    embeddings."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embedding = PatchEmbedding(cfg.in_channels, cfg.dim, cfg.patch_size)
        self.mask_proj = (
            PatchEmbedding(1, cfg.dim, cfg.patch_size, bias=False) if cfg.mask_channel else None
        )
        self.fps_proj = PreciseLinear(cfg.freq_dim, cfg.dim, bias=False) if cfg.fps_embed else None
        self.condition_embedder = ConditionEmbedder(cfg)
        # Where context parallelism cuts the tokens and their rotary table along P, and joins them
        # again.
        self.enter = TokenSeam()
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.num_layers)])
        self.leave = TokenSeam()
        self.norm_out = LayerNorm(cfg.dim, cfg.eps, elementwise_affine=False)
        self.proj_out = Linear(cfg.dim, cfg.velocity_channels * math.prod(cfg.patch_size))
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, cfg.dim))

    def forward(
        self,
        latents_BCTHW: Tensor,
        t_BT: Tensor,
        captions: "Tensor | KnownCaptions",
        caption_mask_BS: Tensor | None = None,
        *,
        mask_BT: Tensor | None = None,
        fps_B: Tensor | None = None,
        images_BIE: Tensor | None = None,
    ) -> Tensor:
        """Velocity of every latent, (B, C, T, H, W) with `model.velocity_channels` for C, in at least
        float32.

        Args:
            latents_BCTHW: noisy latents; H and W divisible by the patch size.
            t_BT: noise level of each latent frame in [0, 1], 0 = data.
            captions: embeddings (B, S, E), or what `know_captions` made of them.
            caption_mask_BS: True for real tokens; None attends to all of them (Wan's padding).
            mask_BT: 1 for condition frames, only with `model.mask_channel`; None means
                none is.
            fps_B: frames a second, with `model.fps_embed` only, and needed there.
            images_BIE: embeddings of `model.images` frames of each clip, one after the other, with
                `model.image_dim` only, and needed there.

        Raises:
            UserError: latents that do not divide into patches, or reach past the rotary positions.
            ValueError: other sizes that do not fit, or an input the model has no layer for.
        """
        self._check(latents_BCTHW, t_BT, mask_BT, fps_B, images_BIE)
        _, num_frames, num_rows, num_columns = latents_BCTHW.shape[1:]
        _, p, q = self.cfg.patch_size

        x_BTPD = at_least_fp32(self.patch_embedding(latents_BCTHW))
        if self.mask_proj is not None:
            x_BTPD = x_BTPD + self.mask_proj(_mask_as_channel(mask_BT, latents_BCTHW))
        table = rope_table(
            (num_frames, num_rows // p, num_columns // q),
            self.cfg.head_dim,
            x_BTPD.device,
            x_BTPD.dtype,
        )
        time_BTD = self._embed_time(t_BT, fps_B)
        modulation_BT6D = self.condition_embedder.modulation(time_BTD)
        each_block = self._each_block(captions)
        embed_images = self.condition_embedder.image_embedder
        images_BID = None if embed_images is None else embed_images(images_BIE)

        x_BTPD, table = self.enter(x_BTPD), self.enter(table)
        for number, block in enumerate(self.blocks):
            own = each_block[number]
            x_BTPD = block(x_BTPD, own, modulation_BT6D, table, caption_mask_BS, images_BID)

        rows = (at_least_fp32(self.scale_shift_table) + time_BTD.unsqueeze(2)).unsqueeze(3)
        shift, scale = rows.unbind(2)
        v_BTPX = at_least_fp32(self.proj_out(modulate(self.norm_out(x_BTPD), shift, scale)))
        return rearrange(
            self.leave(v_BTPX), "B T (h w) (p q C) -> B C T (h p) (w q)", h=num_rows // p, p=p, q=q
        ).contiguous()

    def _each_block(self, captions: "Tensor | KnownCaptions") -> Sequence[Tensor | CaptionKeys]:
        """Captions as every block takes them."""
        if isinstance(captions, KnownCaptions):
            return captions.each_block
        return [self.condition_embedder.text_embedder(captions)] * len(self.blocks)

    def know_captions(self, captions_BSE: Tensor) -> "KnownCaptions":
        """What every block makes of captions, for many calls with the same ones: sampling changes the noise alone."""
        captions_BSD = self.condition_embedder.text_embedder(captions_BSE)
        return KnownCaptions(tuple(block.attn2.caption_keys(captions_BSD) for block in self.blocks))

    def _embed_time(self, t_BT: Tensor, fps_B: Tensor | None) -> Tensor:
        """Noise levels and frame rates as embeddings (B, T, D)."""
        time_BTD = self.condition_embedder.embed_time(t_BT)
        if self.fps_proj is None or fps_B is None:
            return time_BTD
        rates_BF = sinusoid(fps_B.to(time_BTD.dtype), self.cfg.freq_dim)
        return time_BTD + self.fps_proj(rates_BF)[:, None]

    def _check(
        self,
        latents_BCTHW: Tensor,
        t_BT: Tensor,
        mask_BT: Tensor | None,
        fps_B: Tensor | None,
        images_BIE: Tensor | None,
    ) -> None:
        batch, channels, num_frames, num_rows, num_columns = latents_BCTHW.shape
        check_patches(self.cfg, num_frames, num_rows, num_columns)
        if channels != self.cfg.in_channels:
            raise ValueError(
                f"latents have {channels} channels, model.in_channels is {self.cfg.in_channels}"
            )
        if t_BT.shape != (batch, num_frames):
            raise ValueError(
                f"t has shape {tuple(t_BT.shape)}, expected {(batch, num_frames)}: a level a "
                "latent frame"
            )
        if mask_BT is not None and self.mask_proj is None:
            raise ValueError(
                "a conditioning mask was given to a model without mask_proj; set "
                "model.mask_channel=true"
            )
        if (fps_B is None) != (self.fps_proj is None):
            raise ValueError(
                f"fps was {'left out' if fps_B is None else 'given'} but model.fps_embed is "
                f"{self.cfg.fps_embed}"
            )
        count, width = self.cfg.images * self.cfg.image_tokens, self.cfg.image_dim
        expected = (batch, count, width) if width else None
        if (None if images_BIE is None else tuple(images_BIE.shape)) != expected:
            raise ValueError(
                f"embeddings of images have shape {None if images_BIE is None else tuple(images_BIE.shape)}, and "
                f"the model takes {expected} (model.image_dim, image_tokens, image_pair)"
            )

    def initial_values(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """First value of every parameter, float32 on the CPU at full shape, from its own generator
        (seed, name).

        An engine that shards parameters hands each rank its slice of these, so every layout starts
        alike.
        """
        for name, param in self.named_parameters():
            yield name, _initial_value(name, param.shape, self.cfg.dim, seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill the parameters in place with `initial_values`."""
        params = dict(self.named_parameters())
        for name, value in self.initial_values(seed):
            params[name].copy_(value)

    def flops(self, num_tokens: int, text_tokens: int, num_frames: int = 1) -> int:
        """Floating-point operations of one sample's forward pass (a multiply and an add are two);
        backward costs twice that.

        Args:
            num_tokens: video tokens of the sample, L.
            text_tokens: caption tokens attended to, S.
            num_frames: latent frames, each with its own time embedding.
        """
        return transformer_flops(self.cfg, num_tokens, text_tokens, num_frames)


def check_patches(cfg: ModelConfig, num_frames: int, num_rows: int, num_columns: int) -> None:
    """Raises UserError if latents of this size do not divide into patches or have too many of them."""
    _, p, q = cfg.patch_size
    if num_rows % p or num_columns % q:
        raise UserError(
            f"latents of {num_rows}x{num_columns} do not divide into patches of {p}x{q} (model.patch_size); "
            "choose another size of clips or another patch"
        )
    check_positions((num_frames, num_rows // p, num_columns // q), cfg.rope_max_length)


class TokenSeam(nn.Module):
    """Passes tokens (B, T, P, ...) or their rotary table (2, T, P, ...) on; context parallelism
    puts its own in its place."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def _mask_as_channel(mask_BT: Tensor | None, latents_BCTHW: Tensor) -> Tensor:
    """The mask as one latent channel. None becomes zeros: `mask_proj` then still takes part in
    every backward pass, which sharded engines need on all ranks alike."""
    batch, _, num_frames, num_rows, num_columns = latents_BCTHW.shape
    if mask_BT is None:
        mask_BT = latents_BCTHW.new_zeros(batch, num_frames)
    return mask_BT.to(latents_BCTHW.dtype)[:, None, :, None, None].expand(
        -1, -1, -1, num_rows, num_columns
    )


def _initial_value(name: str, shape: torch.Size, dim: int, seed: int) -> Tensor:
    """Xavier for matrices, one for norms, zero for biases, the output layer and the extras: the
    first prediction is 0."""
    leaf = name.rsplit(".", 1)[-1]
    if name in ("proj_out.weight", "mask_proj.weight", "fps_proj.weight") or leaf in (
        "bias",
        "pos_embed",
    ):
        return torch.zeros(shape)
    if leaf == "scale_shift_table":
        return torch.randn(shape, generator=keyed_generator(seed, name)) / dim**0.5
    if len(shape) == 1:
        return torch.ones(shape)
    return xavier_uniform(shape, keyed_generator(seed, name))
