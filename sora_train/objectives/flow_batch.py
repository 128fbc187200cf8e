"""A batch of latents on its way from data to noise, and the velocity loss of a model on it."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sora_train.config.sections.model import ModelConfig
from sora_train.device.clock import DeviceClock
from sora_train.diffusion.condition_masks import frame_times
from sora_train.diffusion.flow import frame_losses, interpolate, velocity_losses
from sora_train.models.text_to_video import VideoDenoiser
from sora_train.models.work_sharing import NO_SHARING, WorkSharing


def blank_inputs(
    model: ModelConfig, clips: int, size: tuple[int, int, int], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """What a model takes of clips with latents of this size (T, H, W) beside noisy latents and captions, by the name in
    FlowBatch: without values, for whoever measures it."""
    found: dict[str, Any] = {"expert": "high"} if model.expert == "both" else {}
    channels = model.in_channels - model.velocity_channels
    if channels:
        found["condition_channels"] = torch.zeros(clips, channels, *size, device=device)
    if model.images:
        shape = clips, model.images * model.image_tokens, model.image_dim
        found["images"] = torch.zeros(shape, device=device)
    return found


@dataclass(frozen=True)
class FlowBatch:
    """Latents on their way from data to noise: everything the velocity loss needs.

    x and noise are (B, C, T, H, W); t_B is each clip's noise level; mask_BT is 1 for latent frames
    that are conditions.
    """

    x: Tensor
    noise: Tensor
    t_B: Tensor
    mask_BT: Tensor
    prompts: list[str]
    fps_B: Tensor
    text: tuple[Tensor | None, ...] = ()
    """Caption embeddings (L, E) that are known already, for the prompts that have one; empty: for none."""
    condition_latents: Tensor | None = None
    """Latents (B, C, T, H, W) of the condition frames, where those of x differ: see diffusion/condition_frames.py."""
    condition_channels: Tensor | None = None
    """With cond_mode=concat: mask channels and condition latents (B, factor + C, T, H, W), an input beside the noisy
    latents. Every frame is then noisy and counts."""
    pictures: np.ndarray | None = None
    """First frames of the clips, for a model of two the last ones too, uint8 (B, N, height, width, 3), whose embeddings
    the model takes; None: it takes none, or `images` are known."""
    images: Tensor | None = None
    """These embeddings (B, I, E)."""
    t_cond_B: Tensor | None = None
    """Noise level of each clip's condition frames; None: 0."""
    t_BT: Tensor | None = None
    """Noise level of each latent frame, where those of a clip differ; None: t_B for all of them."""
    time_weight: Tensor | None = None
    """Factor on each clip's loss (B,), or on each latent frame's (B, T); None: 1."""
    expert: str = ""
    """Which expert computes the batch, for a model of both."""
    sharing: WorkSharing = NO_SHARING
    """Who encodes the captions."""
    encoding: DeviceClock | None = None
    """Times their encoding."""

    def predict(self, model: nn.Module) -> Tensor:
        """The model's velocity (B, C, T, H, W)."""
        assert isinstance(model, VideoDenoiser)
        with self.encoding.running() if self.encoding else nullcontext():
            text = model.embed(self.prompts, self.text or [None] * len(self.prompts), self.sharing)
            beside = self._beside(model)
        if self.condition_channels is not None:
            t_BT = self.levels_BT
            z = torch.cat([interpolate(self.x, self.noise, t_BT), self.condition_channels], dim=1)
            return model(z, t_BT, text, fps_B=self.fps_B, **beside)
        t_cond = 0.0 if self.t_cond_B is None else self.t_cond_B
        t_BT = frame_times(self.levels_BT, self.mask_BT, t_cond)
        clean = self.x
        if self.condition_latents is not None:
            clean = torch.where(
                self.mask_BT[:, None, :, None, None] > 0, self.condition_latents, clean
            )
        z = interpolate(clean, self.noise, t_BT)
        mask_BT = self.mask_BT if model.takes_mask else None
        return model(z, t_BT, text, mask_BT=mask_BT, fps_B=self.fps_B, **beside)

    def _beside(self, model: Any) -> dict[str, Any]:
        """Embeddings of images, where the model takes some, and which expert computes, where it has two."""
        beside: dict[str, Any] = {"expert": self.expert} if self.expert else {}
        if self.pictures is not None:
            beside["images_BIE"] = model.embed_images(self.pictures, self.sharing)
        elif self.images is not None:
            beside["images_BIE"] = self.images
        return beside

    @property
    def levels_BT(self) -> Tensor:
        """Noise level of each latent frame that is no condition, (B, T)."""
        return self.t_B[:, None].expand_as(self.mask_BT) if self.t_BT is None else self.t_BT

    @property
    def counted_BT(self) -> Tensor:
        """1 for the latent frames that the loss is about."""
        if self.condition_channels is not None:
            return torch.ones_like(self.mask_BT)
        return 1.0 - self.mask_BT

    def loss_sum(self, model: nn.Module) -> Tensor:
        """Sum over the samples of each one's mean squared velocity error on the frames that count."""
        return self.losses(model).sum()

    def losses(self, model: nn.Module) -> Tensor:
        """Each sample's mean squared velocity error on the frames that count, (B,)."""
        v = self.predict(model)
        return velocity_losses(
            v, self.x, self.noise, self.counted_BT, time_weight=self.time_weight
        )[0]

    def frame_losses(self, model: nn.Module) -> Tensor:
        """The mean squared velocity error of each latent frame that counts, else 0, (B, T)."""
        v = self.predict(model)
        return frame_losses(v, self.x, self.noise, self.counted_BT, self.time_weight)
