"""AutoencoderKLWan in pieces: a clip's frames a few at a time, and each frame in tiles.

Both are exact. In time the class is causal and keeps the last frames that each convolution has seen,
so what comes out piece by piece is what comes out at once. In space one layer sees a whole frame,
the attention of the middle block, which works at the latents' own small size: it runs on whole
frames. The convolutions between it and the pixels, where the memory goes, run on tiles, each with a
margin as wide as they can see, which is cut off afterwards.

Memory follows the tile and not the length of the clip, but for what comes out.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sora_train.models.vae.geometry import CHUNK

CACHED_FRAMES = 2
Cache = list[Any]
"""What each causal convolution has seen last, in the order in which they are called."""


@dataclass(frozen=True)
class Tile:
    """A part of a frame and the larger part that has to be computed for it, in latents."""

    inner: tuple[slice, slice]
    outer: tuple[slice, slice]

    def read(self, x: Tensor, scale: int = 1) -> Tensor:
        """The outer part of (..., H, W) that has `scale` pixels a latent."""
        rows, columns = (times(part, scale) for part in self.outer)
        return x[..., rows, columns]

    def cut(self, x: Tensor, scale: int = 1) -> Tensor:
        """The inner part of what was computed on the outer one."""
        rows, columns = (
            slice((i.start - o.start) * scale, (i.stop - o.start) * scale)
            for i, o in zip(self.inner, self.outer, strict=True)
        )
        return x[..., rows, columns]

    def write(self, out: Tensor, part: Tensor, scale: int = 1) -> None:
        """Put the inner part where it belongs."""
        rows, columns = (times(part, scale) for part in self.inner)
        out[..., rows, columns] = part


def times(part: slice, scale: int) -> slice:
    return slice(part.start * scale, part.stop * scale)


def tiles(height: int, width: int, size: int, margin: int) -> list[Tile]:
    """Tiles of at most `size` latents a side that cover a frame once, `margin` more around each
    where the frame goes on; size 0 is one tile."""

    def parts(length: int) -> list[tuple[slice, slice]]:
        step = size or length
        return [
            (
                slice(start, min(start + step, length)),
                slice(max(start - margin, 0), min(start + step + margin, length)),
            )
            for start in range(0, length, step)
        ]

    return [
        Tile((rows[0], columns[0]), (rows[1], columns[1]))
        for rows, columns in itertools.product(parts(height), parts(width))
    ]


def decoder_margin(config: dict[str, Any]) -> int:
    """Latents around a tile that reach its pixels: two 3x3 convolutions a residual block, one after
    each doubling and one at the end."""
    levels, blocks = len(config["dim_mult"]) - 1, config["num_res_blocks"] + 1
    reach = sum(2 * blocks / 2**level for level in range(levels + 1))
    reach += sum(1 / 2**level for level in range(1, levels + 1)) + 1 / 2**levels
    return math.ceil(reach)


def encoder_margin(config: dict[str, Any]) -> int:
    """Latents around a tile whose pixels reach it: one convolution, two a residual block, and two
    pixels to one side at each halving."""
    levels, blocks = len(config["dim_mult"]) - 1, config["num_res_blocks"]
    reach = 1 + sum(2 * blocks * 2**level for level in range(levels + 1))
    reach += sum(2 * 2**level for level in range(levels))
    return math.ceil(reach / 2**levels)


Pieces = Iterator[tuple[slice, Tile, Tensor]]
"""Which frames of the clip, which part of them, and its pixels."""


def decode_pieces(
    autoencoder: nn.Module, raw: Tensor, tile: int = 0, turns: Sequence[int] | None = None
) -> Pieces:
    """(frames, tile, pixels of its inner part, not clamped) until every pixel has come once.

    Args:
        raw: latents (B, C, t, h, w) as the VAE gives them.
        tile: latents a side; 0 decodes whole frames, in the class's own order of operations.
        turns: the latent frames to decode, in this order, 0 first; all of them if left out. Whoever leaves some out
            provides what the others would have left behind. One behind the last stands for the last.
    """
    config, decoder = dict(autoencoder.config), autoencoder.decoder
    patch = config["patch_size"] or 1
    scale = 2 ** (len(config["dim_mult"]) - 1)
    hidden = autoencoder.post_quant_conv(raw)
    count = autoencoder._cached_conv_counts["decoder"]
    whole = not 0 < tile < max(raw.shape[-2:])
    height, width = raw.shape[-2:]
    plan = tiles(height, width, 0 if whole else tile, decoder_margin(config))
    for part in plan:
        cache: Cache = [None] * count
        for i in range(raw.shape[2]) if turns is None else turns:
            frame = hidden[:, :, min(i, raw.shape[2] - 1)].unsqueeze(2)
            index, first = [0], {"first_chunk": i == 0}
            if whole:
                pixels = decoder(frame, feat_cache=cache, feat_idx=index, **first)
            else:
                # Computed anew for each tile: it costs little, and keeping it would cost memory
                # that grows with the clip.
                x = cached_conv(decoder.conv_in, frame, cache, index)
                x = part.read(decoder.mid_block(x, feat_cache=cache, feat_idx=index))
                for block in decoder.up_blocks:
                    x = block(x, feat_cache=cache, feat_idx=index, **first)
                x = decoder.nonlinearity(decoder.norm_out(x))
                pixels = part.cut(cached_conv(decoder.conv_out, x, cache, index), scale)
            pixels = unfolded(pixels, patch)
            start = 1 + (i - 1) * pixels.shape[2] if i else 0
            yield slice(start, start + pixels.shape[2]), part, pixels


def encode_raw(autoencoder: nn.Module, pixels: Tensor, tile: int = 0) -> Tensor:
    """Mean and log-variance side by side (B, 2C, t, h, w), frames taken a chunk at a time.

    Args:
        pixels: (B, 3, T, H, W) on any device; a chunk at a time comes to the VAE's.
        tile: latents a side; 0 encodes whole frames, in the class's own order of operations.
    """
    config, encoder = dict(autoencoder.config), autoencoder.encoder
    patch = config["patch_size"] or 1
    scale = 2 ** (len(config["dim_mult"]) - 1)
    height, width = (size // (patch * scale) for size in pixels.shape[-2:])
    count = autoencoder._cached_conv_counts["encoder"]
    cache: Cache = [None] * count
    if not 0 < tile < max(height, width):
        out = [
            encoder(chunk, feat_cache=cache, feat_idx=[0])
            for chunk in chunks(autoencoder, pixels, patch)
        ]
        return autoencoder.quant_conv(torch.cat(out, 2))

    features: list[Tensor] = []
    middle = 0
    for part in tiles(height, width, tile, encoder_margin(config)):
        seen: Cache = [None] * count
        for number, chunk in enumerate(chunks(autoencoder, pixels, patch, part, scale)):
            index = [0]
            x = cached_conv(encoder.conv_in, chunk, seen, index)
            for block in encoder.down_blocks:
                x = block(x, feat_cache=seen, feat_idx=index)
            if number == len(features):
                features.append(x.new_empty(*x.shape[:3], height, width))
            part.write(features[number], part.cut(x))
            middle = index[0]
    out = []
    for feature in features:
        index = [middle]
        x = encoder.mid_block(feature, feat_cache=cache, feat_idx=index)
        x = encoder.nonlinearity(encoder.norm_out(x))
        out.append(cached_conv(encoder.conv_out, x, cache, index))
    return autoencoder.quant_conv(torch.cat(out, 2))


def chunks(
    autoencoder: nn.Module, pixels: Tensor, patch: int, part: Tile | None = None, scale: int = 1
) -> Iterator[Tensor]:
    """The first frame, then four at a time, as the encoder takes them."""
    weight = next(autoencoder.parameters())
    for start in range(-CHUNK + 1, pixels.shape[2], CHUNK):
        frames = pixels[:, :, max(start, 0) : start + CHUNK]
        if part is not None:
            frames = part.read(frames, scale * patch)
        yield folded(frames.to(weight), patch)


def cached_conv(conv: nn.Module, x: Tensor, cache: Cache, index: list[int]) -> Tensor:
    """A causal convolution after the frames it saw last, which are replaced by these."""
    at = index[0]
    kept = x[:, :, -CACHED_FRAMES:].clone()
    if kept.shape[2] < CACHED_FRAMES and cache[at] is not None:
        kept = torch.cat([cache[at][:, :, -1:], kept], dim=2)
    out: Tensor = conv(x, cache[at])
    cache[at] = kept
    index[0] += 1
    return out


def folded(pixels: Tensor, patch: int) -> Tensor:
    """Squares of pixels as channels, as the class folds them."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

    return patchify(pixels, patch)


def unfolded(pixels: Tensor, patch: int) -> Tensor:
    """The inverse of `folded`."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    return unpatchify(pixels, patch)
