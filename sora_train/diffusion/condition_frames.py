"""What the condition frames of a clip look like: the same in training, where they are cut from a clip,
and in sampling, where nothing else is known.

Latent 0 of a clip holds the first pixel frame alone, latent i >= 1 holds `factor` pixel frames (1 +
factor * (i - 1) to factor * i) and remembers all before them; with a VAE that is not causal each
sees all frames. So a piece of a clip cannot simply be cut from the clip's latents, which know frames
that the sampler does not have; only its beginning can, and that of a causal VAE. Nor can a piece from
the middle or the end be encoded as it is: its first frame would become a latent of the other phase,
one frame long, in a place where a latent is `factor` frames long. Both would train a model for
latents that it never meets.

Here each run of condition frames is encoded from its own pixels alone. A run that does not begin
the clip is led in by copies of its own first frame, whose latents are dropped: what is left has the
phase of its place. A single image at such a place is held for `factor` frames. Training and
sampling both call `encode_condition_frames` (frames replaced) or `encode_whole` (concatenated channels).

Dimension key: B batch, C latent channels, T, H, W latent frames, rows, columns; F pixel frames.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sora_train.diffusion.condition_masks import STILL_KINDS

Encode = Callable[[Tensor], Tensor]
"""From pixels (1, 3, F, height, width) in [-1, 1] to standardised latents (1, C, T, H, W)."""


def pixel_mask(kind: str, mask_T: Tensor, factor: int) -> Tensor:
    """Mask (F,) of the pixel frames that are known where latent frames `mask_T` are conditions.

    All `factor` frames of such a latent frame, but only the last of them for the kinds that are
    given as single images.

    Args:
        factor: pixel frames of every latent frame but the first, the VAE's temporal factor.
    """
    frames_TF = mask_T[1:, None].repeat(1, factor)
    if kind in STILL_KINDS:
        frames_TF[:, :-1] = 0
    return torch.cat([mask_T[:1], frames_TF.flatten()])


def latent_mask(mask_F: Tensor, factor: int) -> Tensor:
    """Mask (T,) of the latent frames of which a pixel frame is known; undoes `pixel_mask`."""
    return torch.cat([mask_F[:1], mask_F[1:].view(-1, factor).amax(dim=1)])


def encode_condition_frames(
    encode: Encode, pixels: Tensor, mask_F: Tensor, factor: int, frame_step: int
) -> Tensor:
    """Latents (1, C, T, H, W) of the condition frames, each run from its own pixels; 0 elsewhere.

    Args:
        encode: the VAE.
        pixels: (1, 3, F, height, width); frames that are not known may hold anything.
        mask_F: as `pixel_mask` makes it.
        factor: temporal factor of the VAE.
        frame_step: clips that the VAE takes have 1 + k * frame_step frames.

    Raises:
        ValueError: there is no condition frame, or a latent frame is known in part but not as a still.
    """
    mask_T = latent_mask(mask_F, factor)
    runs = _runs(mask_F, factor)
    if not runs:
        raise ValueError("no frame is a condition, so there is nothing to encode")
    latents: Tensor | None = None
    for start, stop in runs:
        run = _encode_run(encode, pixels, mask_F, (start, stop), factor, frame_step)
        if latents is None:
            batch, channels, _, rows, columns = run.shape
            latents = run.new_zeros(batch, channels, len(mask_T), rows, columns)
        latents[:, :, start:stop] = run
    assert latents is not None
    return latents


def encode_whole(encode: Encode, pixels: Tensor, mask_F: Tensor) -> Tensor:
    """Latents (1, C, T, H, W) of the whole clip with every unknown pixel at 0, mid-grey.

    This is what Wan 2.1's image-to-video weights are shown (arXiv:2503.20314, section 5.1).
    """
    known = (mask_F > 0).to(pixels.device)[:, None, None]
    return encode(torch.where(known, pixels, torch.zeros_like(pixels)))


def mask_channels(mask_BF: Tensor, factor: int) -> Tensor:
    """The mask of pixel frames as `factor` channels of the latents' length, (B, factor, T).

    Channel j of latent i is frame j of its `factor`; the first frame fills all channels of latent 0
    (`WanImageToVideoPipeline.prepare_latents` of diffusers).
    """
    first_BF = mask_BF[:, :1].repeat(1, factor)
    return torch.cat([first_BF, mask_BF[:, 1:]], dim=1).view(len(mask_BF), -1, factor).mT


def condition_channels(latents: Tensor, mask_BF: Tensor, factor: int) -> Tensor:
    """What stands beside the noisy latents with `cond_mode=concat`, (B, factor + C, T, H, W): mask
    channels, then condition latents.

    Args:
        latents: what `encode_whole` returned, (B, C, T, H, W).
        mask_BF: known pixel frames.
        factor: temporal factor of the VAE.
    """
    mask = mask_channels(mask_BF.to(latents), factor)[..., None, None]
    return torch.cat([mask.expand(-1, -1, -1, *latents.shape[3:]), latents], dim=1)


def there_and_back(frames: Tensor, dim: int) -> Tensor:
    """A clip that is a loop: its first half forwards, then the same frames backwards.

    Real clips hardly ever end as they begin; this one does, exactly, at its own speed.
    """
    count = frames.shape[dim]
    order = torch.minimum(torch.arange(count), count - 1 - torch.arange(count))
    return frames.index_select(dim, order.to(frames.device))


def _runs(mask_F: Tensor, factor: int) -> list[tuple[int, int]]:
    """[start, stop) of each run of condition frames that are encoded together; a still is alone."""
    known = [factor if bool(mask_F[0] > 0) else 0]
    known += (mask_F[1:].view(-1, factor) > 0).sum(dim=1).tolist()
    runs: list[tuple[int, int]] = []
    for i, count in enumerate(known):
        if count == 0:
            continue
        whole = count == factor
        if not whole and not (count == 1 and mask_F[i * factor] > 0):
            raise ValueError(
                f"of latent frame {i} {count} pixel frames are given; give all {factor}, or the "
                "last one as a still image"
            )
        if whole and runs and runs[-1][1] == i and known[i - 1] == factor:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs


def _encode_run(
    encode: Encode,
    pixels: Tensor,
    mask_F: Tensor,
    run: tuple[int, int],
    factor: int,
    frame_step: int,
) -> Tensor:
    """Latents of one run, of its pixels alone and in the phase of its place."""
    start, stop = run
    if start == 0:
        window = pixels[:, :, : 1 + factor * (stop - 1)]
        # They round up to what the VAE takes; one that is causal makes the same latents without them.
        filler = window[:, :, -1:].repeat(1, 1, -(window.shape[2] - 1) % frame_step, 1, 1)
        return encode(torch.cat([window, filler], dim=2))[:, :, :stop]
    window = pixels[:, :, factor * (start - 1) + 1 : factor * (stop - 1) + 1]
    if not mask_F[factor * (start - 1) + 1]:
        window = window[:, :, -1:].repeat(1, 1, factor, 1, 1)
    lead = window[:, :, :1].repeat(1, 1, 1 + -window.shape[2] % frame_step, 1, 1)
    return encode(torch.cat([lead, window], dim=2))[:, :, start - stop :]
