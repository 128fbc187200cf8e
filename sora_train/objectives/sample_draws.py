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
from sora_train.diffusion.draws import SampleKey, draw_uniform, draw_uniforms
from sora_train.diffusion.spec import DiffusionSpec


@dataclass(frozen=True)
class SampleDraws:
    """The draws of B clips of one shape, on the CPU."""

    kinds: list[str]
    """Kind of conditioning; `t2v` where the condition was dropped."""
    mask_BT: Tensor
    """1 for the latent frames that are conditions, (B, T)."""
    t_B: Tensor
    """Noise level of each clip, (B,); the mean of its free frames where these have levels of their own."""
    t_cond_B: Tensor
    """Noise level of its condition frames, (B,)."""
    prompts: list[str]
    """The captions, '' where one was dropped: the null caption is the encoded empty string."""
    t_BT: Tensor | None = None
    """Noise level of each latent frame, (B, T), where `frame_noise_share` gives some clips one a frame; else None."""

    @property
    def levels(self) -> Tensor:
        """The noise levels that the loss is weighted at: (B,), or (B, T) with `frame_noise_share`."""
        return self.t_B if self.t_BT is None else self.t_BT


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
    mask_BT = frame_masks(kinds, num_frames, uniform("cond_mask").tolist())
    t_B, t_BT = spec.training_times(uniform("timestep"), latent_size, expert), None
    if spec.frame_noise_share > 0:
        forced_B = uniform("frame_noise") < spec.frame_noise_share
        drawn_BT = draw_uniforms(seed, "frame_timestep", samples, num_frames)
        t_BT = spec.training_times(drawn_BT, latent_size, expert)
        t_BT = torch.where(forced_B[:, None], t_BT, t_B[:, None])
        free_BT = 1 - mask_BT
        t_B = torch.where(forced_B, (t_BT * free_BT).sum(1) / free_BT.sum(1), t_B)
    return SampleDraws(
        kinds=kinds,
        mask_BT=mask_BT,
        t_B=t_B,
        t_BT=t_BT,
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
