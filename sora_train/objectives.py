"""What is minimised: from this rank's clips to named terms, each a sum with its weight.

A term's weight is announced before the first forward of a step, so that the true total over all
ranks and micro-batches is known before the first backward and the loss is scaled in one place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sora_train.config import Config, VaeObjectiveConfig
from sora_train.data.sample import Clip, ClipBatch
from sora_train.diffusion.conditioning import choose_kind, frame_mask, frame_times
from sora_train.diffusion.draws import draw_noise, draw_uniform
from sora_train.diffusion.flow import interpolate, token_loss, velocity_loss
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae import VideoVAE


@dataclass(frozen=True)
class Term:
    """A differentiable sum over samples and the number of samples (or what else) it is a sum of."""

    sum: Tensor
    weight: float


class Objective(Protocol):
    """Subclass or write your own: see docs/extend.md."""

    def weights(self, batch: ClipBatch) -> dict[str, float]:
        """Weight of every term for this micro-batch, known without any forward."""

    def terms(self, model: nn.Module, batch: ClipBatch) -> dict[str, Term]:
        """The same names with their differentiable sums; the loss is the sum of sum / total weight."""


def to_pixels(clips: list[Clip], device: torch.device) -> Tensor:
    """uint8 (T, H, W, 3) clips -> float32 pixels (B, 3, T, H, W) in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([clip.pixels for clip in clips if clip.pixels is not None]))
    return stacked.to(device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def placeholder(batch: ClipBatch) -> list[Clip]:
    """One black clip for a slot without clips: its gradient is multiplied by zero, its collectives are not."""
    bucket = batch.micro_batch.bucket
    pixels = np.zeros((bucket.frames, bucket.height, bucket.width, 3), np.uint8)
    return [Clip(row=0, epoch=0, pixels=pixels, latents=None, fps=1.0, caption="", digest="")]


def stored_text(clips: list[Clip], prompts: list[str]) -> tuple[Tensor | None, ...]:
    """The stored embeddings of prompts that are still their clip's caption."""
    return tuple(
        None if clip.text is None or prompt != clip.caption else torch.from_numpy(clip.text)
        for clip, prompt in zip(clips, prompts, strict=True)
    )


class TextToVideoObjective:
    """Rectified flow on the latents of captioned clips."""

    def __init__(self, cfg: Config, spec: DiffusionSpec, vae: VideoVAE, device: torch.device):
        self.cfg = cfg
        self.spec = spec
        self.vae = vae
        self.device = device

    def weights(self, batch: ClipBatch) -> dict[str, float]:
        """Good clips, or with `loss.reduce=per_token` their video tokens that are not given."""
        if self.cfg.loss.reduce == "per_sample":
            return {"velocity": batch.weight}
        if not batch.clips:
            return {"velocity": 0.0}
        num_frames, tokens = self.token_grid(batch)
        keys = [(clip.epoch, clip.row) for clip in batch.clips]
        given = float(self.given_frames(keys, num_frames).sum())
        return {"velocity": (len(batch.clips) * num_frames - given) * tokens}

    def terms(self, model: nn.Module, batch: ClipBatch) -> dict[str, Term]:
        # Not self.weights(): who derives from this class may name its terms otherwise.
        weight = TextToVideoObjective.weights(self, batch)["velocity"]
        flow = self.flow_batch(batch)
        if self.cfg.loss.reduce == "per_sample":
            loss_sum = flow.loss_sum(model)
        else:
            loss_sum = flow.token_loss(model, self.token_grid(batch)[1])[0]
        return {"velocity": Term(loss_sum * float(weight > 0), weight)}

    def token_grid(self, batch: ClipBatch) -> tuple[int, int]:
        """Latent frames of the batch's clips, and video tokens of each frame."""
        bucket, (_, p, q) = batch.micro_batch.bucket, self.cfg.model.patch_size
        _, frames, rows, columns = self.vae.latent_shape(bucket.frames, bucket.height, bucket.width)
        return frames, (rows // p) * (columns // q)

    def flow_batch(self, batch: ClipBatch) -> "FlowBatch":
        """The batch on its way to noise, every draw keyed by sample."""
        clips = batch.clips or placeholder(batch)
        seed, keys = self.cfg.seed, [(clip.epoch, clip.row) for clip in clips]
        x = self.latents(clips)
        u_B = draw_uniform(seed, "timestep", keys)
        prompts = self.drop_captions([clip.caption for clip in clips], keys)
        return FlowBatch(
            x=x,
            noise=draw_noise(seed, "noise", keys, x.shape[1:]).to(x.device),
            t_B=self.spec.training_times(u_B, x.shape[2:]).to(x.device),
            mask_BT=self.given_frames(keys, x.shape[2]).to(x.device),
            prompts=prompts,
            fps_B=torch.tensor([clip.fps for clip in clips], device=x.device),
            text=stored_text(clips, prompts),
        )

    def given_frames(self, keys: list[tuple[int, int]], num_frames: int) -> Tensor:
        """Mask (B, T) of the latent frames each sample is shown clean, by the spec's conditioning."""
        kinds = draw_uniform(self.cfg.seed, "cond_kind", keys).tolist()
        counts = draw_uniform(self.cfg.seed, "cond_mask", keys).tolist()
        return torch.stack(
            [
                frame_mask(choose_kind(self.spec.conditioning, u_kind), num_frames, u_count)
                for u_kind, u_count in zip(kinds, counts, strict=True)
            ]
        )

    def latents(self, clips: list[Clip]) -> Tensor:
        """Normalised latents (B, C, T, H, W), float32: stored ones, or encoded now.

        Encoded one by one, so that a clip's latents never depend on its neighbours in the batch.
        """
        return torch.cat([self.latents_of(clip) for clip in clips])

    @torch.no_grad()
    def latents_of(self, clip: Clip) -> Tensor:
        """Latents (1, C, T, H, W) of one clip on the device."""
        if clip.latents is not None:
            return torch.from_numpy(clip.latents)[None].to(self.device)
        return self.vae.encode(to_pixels([clip], self.device)).float()

    def drop_captions(self, prompts: list[str], keys: list[tuple[int, int]]) -> list[str]:
        """The null caption is the encoded empty string."""
        u_B = draw_uniform(self.cfg.seed, "caption_dropout", keys).tolist()
        return [
            "" if u < self.spec.caption_dropout else prompt
            for u, prompt in zip(u_B, prompts, strict=True)
        ]


@dataclass(frozen=True)
class FlowBatch:
    """Latents on their way from data to noise: everything the velocity loss needs.

    x and noise are (B, C, T, H, W); t_B is each clip's noise level; mask_BT is 1 for latent frames
    that are given clean.
    """

    x: Tensor
    noise: Tensor
    t_B: Tensor
    mask_BT: Tensor
    prompts: list[str]
    fps_B: Tensor
    text: tuple[Tensor | None, ...] = ()
    """Caption embeddings (L, E) that are known already, for the prompts that have one; empty: for none."""

    def predict(self, model: nn.Module) -> Tensor:
        """The model's velocity (B, C, T, H, W)."""
        assert isinstance(model, TextToVideo)
        t_BT = frame_times(self.t_B, self.mask_BT)
        z = interpolate(self.x, self.noise, t_BT)
        mask_BT = self.mask_BT if model.transformer.mask_proj is not None else None
        text = model.embed(self.prompts, self.text or [None] * len(self.prompts))
        return model(z, t_BT, text, mask_BT=mask_BT, fps_B=self.fps_B)

    def loss_sum(self, model: nn.Module) -> Tensor:
        """Sum over the samples of each one's mean squared velocity error on frames not given."""
        return velocity_loss(self.predict(model), self.x, self.noise, 1.0 - self.mask_BT)[0]

    def token_loss(self, model: nn.Module, tokens_per_frame: int) -> tuple[Tensor, Tensor]:
        """Sum over the video tokens not given of each one's mean squared velocity error, and how
        many these are."""
        v = self.predict(model)
        return token_loss(v, self.x, self.noise, 1.0 - self.mask_BT, tokens_per_frame)


class VaeObjective:
    """Reconstruction of pixels: absolute error, absolute error of differences, and a KL divergence."""

    def __init__(self, cfg: Config, device: torch.device):
        self.seed = cfg.seed
        self.cfg: VaeObjectiveConfig = cfg.vae_objective
        self.device = device

    def weights(self, batch: ClipBatch) -> dict[str, float]:
        return {name: batch.weight for name, factor in self.cfg.model_dump().items() if factor > 0}

    def terms(self, model: nn.Module, batch: ClipBatch) -> dict[str, Term]:
        clips = batch.clips or placeholder(batch)
        pixels = to_pixels(clips, self.device)
        keys = [(clip.epoch, clip.row) for clip in clips]
        reconstruction, mean, logvar = model(
            pixels, lambda shape: draw_noise(self.seed, "posterior", keys, shape)
        )
        errors: Mapping[str, Tensor] = {
            "mse": per_sample(reconstruction.sub(pixels).square()),
            "l1": per_sample(reconstruction.sub(pixels).abs()),
            "gradient": difference_error(reconstruction, pixels),
            # KL(N(mean, exp(logvar)) || N(0, 1)) per latent value (Kingma & Welling 2014, arXiv:1312.6114, app. B).
            "kl": per_sample(0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)),
        }
        factors: dict[str, Any] = self.cfg.model_dump()
        good = float(batch.weight > 0)
        return {
            name: Term(factors[name] * good * errors[name].sum(), batch.weight)
            for name in self.weights(batch)
        }


def per_sample(error: Tensor) -> Tensor:
    return error.flatten(1).mean(dim=1)


def difference_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbours in time, height and width, (B,)."""
    axes = [axis for axis in (2, 3, 4) if a.shape[axis] > 1]
    errors = [per_sample((a.diff(dim=axis) - b.diff(dim=axis)).abs()) for axis in axes]
    return torch.stack(errors).sum(dim=0)
