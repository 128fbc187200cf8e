"""Given frames at their places in a clip: whole latent frames, as the kinds of conditioning have them.

Latent frame 0 of a clip holds its first frame, latent frame i the `factor` frames from 1 + factor * (i - 1). An image
is held for a latent frame, and a video begins and ends with one.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from sora_train.diffusion.condition_frames import latent_mask
from sora_train.errors import UserError
from sora_train.models.vae.geometry import Geometry
from sora_train.sampling.given_files import GivenFile
from sora_train.sampling.operations import Prepared
from sora_train.sampling.pipeline import ClipShape, ConditionFrames

Run = tuple[int, np.ndarray]
"""The number of the first frame, and frames that are given from there on, uint8 (F, H, W, 3)."""


def on_latent_frames(frames: np.ndarray, at: int, factor: int, *, is_still: bool) -> Run:
    """Frames on the latent frames nearest to frame `at`; an image is held for one.

    Of a video the last frames that fill no latent frame are left off: nothing may remain of a short one.
    """
    number = round(at / factor) if is_still else round((at - 1) / factor) + 1
    if number <= 0:
        return 0, frames[:1] if is_still else frames[: len(frames) - (len(frames) - 1) % factor]
    first = 1 + factor * (number - 1)
    if is_still:
        return first, frames[:1].repeat(factor, axis=0)
    return first, frames[: len(frames) - len(frames) % factor]


def with_given(runs: Sequence[Run], shape: ClipShape, geometry: Geometry) -> Prepared:
    """A clip of which `runs` are given, each of whole latent frames. Images pass through the autoencoder, and videos
    keep their own pixels, as in every operation.

    Raises UserError where nothing is left to make.
    """
    if not runs:
        return Prepared(shape, "t2v")
    known_F, own_F = torch.zeros(shape.frames), torch.zeros(shape.frames)
    pixels = np.zeros((shape.frames, shape.height, shape.width, 3), np.uint8)
    for first, frames in runs:
        place = slice(first, first + len(frames))
        pixels[place], known_F[place], own_F[place] = frames, 1, float(not is_still(frames))
    mask_T = latent_mask(known_F, geometry.temporal_factor)
    if mask_T.all():
        raise UserError(
            "every frame is given, so nothing is left to make; give fewer, or make a longer video"
        )
    kind = kind_of(mask_T, stills=not own_F.any())
    return Prepared(shape, kind, ConditionFrames(pixels, kind, mask_T), own_F)


def with_references(
    files: Sequence[GivenFile], shape: ClipShape, geometry: Geometry, alpha_background: str
) -> Prepared:
    """A clip that references lead in, one after the other; they are left off what is made of it.

    Images take a latent frame each, and videos share what is left of the clip's first half.
    Raises UserError where nothing is left to make.
    """
    factor = geometry.temporal_factor
    num_frames = geometry.latent_shape(shape.frames, shape.height, shape.width)[1]
    videos = sum(file.kind == "video" for file in files)
    each = max(1, (num_frames // 2 - len(files) + videos) // max(1, videos))
    runs: list[Run] = []
    number = 0
    for file in files:
        frames = file.frames(shape, alpha_background)
        is_still = file.kind == "image" or len(frames) < (factor if number else 1)
        at = factor * number if is_still else 1 + factor * (number - 1)
        most = factor * each - (0 if number else factor - 1)
        runs.append(on_latent_frames(frames[:most], at, factor, is_still=is_still))
        number += -(-len(runs[-1][1]) // factor)
    lead = 1 + factor * (number - 1)
    if number >= num_frames:
        raise UserError(
            f"--reference: {len(files)} references take {number} latent frames, and a clip of {shape.frames} frames "
            f"has {num_frames}, so nothing is left to make; give fewer, or take --frames {1 + factor * (number + 1)}"
        )
    note = (
        f"references stand before the clip as its first {lead} frames and are left off, so {shape.frames - lead} "
        "frames are made that begin where the last reference ends: no run is trained to take a look or a character "
        "from them otherwise"
    )
    crops = [file.crop_note(shape) for file in files]
    prepared = with_given(runs, shape, geometry)
    return replace(prepared, lead=lead, told=(*filter(None, crops), note))


def kind_of(mask_T: Tensor, *, stills: bool) -> str:
    """The kind of conditioning whose mask this is, of single images or not; `random` is any."""
    given = [bool(value) for value in mask_T > 0]
    head, tail = given.index(False), given[::-1].index(False)
    if sum(given) != head + tail:
        return "random"
    if stills and max(head, tail) == 1:
        return "i2v_both" if head and tail else "i2v" if head else "i2v_last"
    if head and tail:
        return "connect" if head == tail else "infill"
    return "extend" if head else "extend_back"


def is_still(frames: np.ndarray) -> bool:
    """Whether a run of given frames is one image."""
    return bool((frames == frames[:1]).all())
