"""What chance decides about the clips of a batch, each draw keyed by the clip's epoch and row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_train.diffusion.condition_masks import (
    choose_kind,
    condition_times,
    frame_mask,
    kind_for,
)
from sora_train.diffusion.draws import SampleKey, draw_uniform
from sora_train.diffusion.spec import DiffusionSpec


@dataclass(frozen=True)
class SampleDraws:
    """The draws of B clips of one shape, on the CPU."""

    kinds: list[str]
    """Kind of conditioning; `t2v` where the condition was dropped."""
    mask_BT: Tensor
    """1 for the latent frames that are conditions, (B, T)."""
    t_B: Tensor
    """Noise level of each clip, (B,)."""
    t_cond_B: Tensor
    """Noise level of its condition frames, (B,)."""
    prompts: list[str]
    """The captions, '' where one was dropped: the null caption is the encoded empty string."""


def draw_samples(
    spec: DiffusionSpec,
    seed: int,
    samples: Sequence[SampleKey],
    captions: Sequence[str],
    latent_size: tuple[int, int, int],
    expert: str = "",
) -> SampleDraws:
    """The draws of clips with latents of `latent_size` (T, H, W), their noise levels in the window of `expert`."""

    def uniform(stream: str) -> Tensor:
        return draw_uniform(seed, stream, samples)

    num_frames = latent_size[0]
    kinds = [
        "t2v"
        if u_drop < spec.condition_dropout
        else kind_for(choose_kind(spec.conditioning, u_kind), num_frames)
        for u_kind, u_drop in zip(
            uniform("cond_kind").tolist(), uniform("cond_dropout").tolist(), strict=True
        )
    ]
    return SampleDraws(
        kinds=kinds,
        mask_BT=frame_masks(kinds, num_frames, uniform("cond_mask").tolist()),
        t_B=spec.training_times(uniform("timestep"), latent_size, expert),
        t_cond_B=condition_times(
            uniform("cond_noise"),
            uniform("cond_noise_level"),
            spec.condition_noise_share,
            spec.condition_noise_max,
        ),
        prompts=[
            "" if u < spec.caption_dropout else caption
            for u, caption in zip(uniform("caption_dropout").tolist(), captions, strict=True)
        ],
    )


def frame_masks(kinds: Sequence[str], num_frames: int, uniform: Sequence[float]) -> Tensor:
    """Masks (B, T) of the condition frames of each kind; the uniform draws decide what a kind leaves open."""
    pairs = zip(kinds, uniform, strict=True)
    return torch.stack([frame_mask(kind, num_frames, u) for kind, u in pairs])
