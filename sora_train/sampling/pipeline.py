"""From prompts to clips, during training and after it: one function, one diffusion spec.

Dimension key: B batch, C latent channels, T, H, W latent frames, rows, columns, F pixel frames.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sora_train.diffusion.condition_frames import (
    condition_channels,
    encode_condition_frames,
    encode_whole,
    pixel_mask,
)
from sora_train.diffusion.draws import draw_noise
from sora_train.diffusion.flow import interpolate
from sora_train.diffusion.guidance import guide, guide_both, rescale
from sora_train.diffusion.sampler import sample_ode
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import Fault, UserError
from sora_train.models.finite_weights import is_finite
from sora_train.models.image_encoder import pictures_of
from sora_train.models.text_to_video import Text, TextToVideo, VideoDenoiser
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.vae.pixels import from_uint8, to_uint8
from sora_train.sampling.step_cache import StepCache, cached_steps
from sora_train.sampling.upscale import WHOLE, Place, Windows

CLIPS_AT_ONCE = 16
"""Clips of one batch."""


@dataclass(frozen=True)
class ClipShape:
    """Size of the clips to make, in pixels and frames, and their rate in frames a second."""

    frames: int
    height: int
    width: int
    fps: float

    @property
    def told_fps(self) -> float:
        """The rate that a model is told: a single frame has none, 0, as in training."""
        return self.fps if self.frames > 1 else 0.0


@dataclass(frozen=True)
class ConditionFrames:
    """What is known of every clip to be made, as pixels."""

    pixels: np.ndarray
    """uint8 (F, height, width, 3); frames that are not known may hold anything."""
    kind: str
    """Kind of conditioning, as in training."""
    mask_T: Tensor
    """1 for latent frames that are conditions."""
    strength_T: Tensor | None = None
    """Noise level from which each latent frame of a whole known clip is made anew; then no frame is a condition."""
    windows: Windows | None = None
    """In which such a clip is made anew, where it is not made at once."""

    def known_frames(self, vae: VideoVAE) -> Tensor:
        """Mask (F,) of the pixel frames that are known."""
        return pixel_mask(self.kind, self.mask_T, vae.temporal_factor)


@dataclass(frozen=True)
class ConditionLatents:
    """`ConditionFrames` as model and sampler take it; one clip, since it is the same for all."""

    latents: Tensor
    """(1, C, T, H, W), clean."""
    mask_T: Tensor | None
    strength_T: Tensor | None
    channels: Tensor | None = None
    """With cond_mode=concat the channels beside the noisy latents, (1, factor + C, T, H, W)."""
    null_channels: Tensor | None = None
    """The same without condition frames."""
    frames: np.ndarray | None = None
    """The clip's pixels, uint8 (F, height, width, 3), of which a model may be given embeddings."""
    known_F: np.ndarray | None = None
    """Above 0 for those that are known."""
    windows: Windows | None = None


@torch.no_grad()
def encode_conditions(
    frames: ConditionFrames, vae: VideoVAE, spec: DiffusionSpec
) -> ConditionLatents:
    """Latents of the condition frames, each run from its own pixels, just as in training."""
    device = next(vae.parameters()).device
    if frames.windows is not None and spec.cond_mode == "concat":
        raise UserError(
            "a model with cond_mode=concat takes condition channels of whole clips, and windows have none; "
            "upscale with a model of cond_mode=replace"
        )
    pixels = from_uint8(frames.pixels[None], device)
    mask_T = frames.mask_T.to(device)
    if spec.cond_mode == "concat":
        known_F = frames.known_frames(vae).to(device)
        given, none = (
            condition_channels(
                encode_whole(vae.encode, pixels, mask_F).float(), mask_F[None], vae.temporal_factor
            )
            for mask_F in (known_F, torch.zeros_like(known_F))
        )
        # Every frame is noisy there, so nothing is kept: only an edited clip is started from.
        latents = vae.encode(pixels).float() if frames.strength_T is not None else given
        return ConditionLatents(
            latents, None, frames.strength_T, given, none, frames.pixels, known_F.cpu().numpy()
        )
    if frames.strength_T is not None:
        strength_T = frames.strength_T.to(device)
        return ConditionLatents(
            vae.encode(pixels).float(), None, strength_T, windows=frames.windows
        )
    latents = encode_condition_frames(
        vae.encode, pixels, frames.known_frames(vae), vae.temporal_factor, vae.frame_step
    )
    return ConditionLatents(latents.float(), mask_T, None)


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    spec: DiffusionSpec,
    prompts: list[str],
    noise: Tensor,
    fps: float,
    *,
    negative_prompt: str | Sequence[str] = "",
    conditions: ConditionLatents | None = None,
    condition_noise: float = 0.0,
    step_cache: float = 0.0,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents (B, C, T, H, W) of one batch of prompts from their noise.

    Args:
        negative_prompt: what guidance leads away from, in place of the empty caption; one for all or one a prompt.
        conditions: the condition frames, the same for all clips.
        condition_noise: noise level at which condition frames are shown to the model. They come back
            clean; a little hides flaws of generated ones (SkyReels-V2, arXiv:2504.13074).
        step_cache: change up to which the transformer's blocks are skipped, see step_cache.py; 0 is off.
        on_step: called with the number of the sampler's steps done, after each.
    """
    batch = len(prompts)
    mask_BT: Tensor | None = None
    latents: Tensor | None = None
    strength_T = None if conditions is None else conditions.strength_T
    if conditions is not None and (conditions.mask_T is not None or strength_T is not None):
        latents = conditions.latents.expand(batch, -1, -1, -1, -1)
        mask_BT = None if conditions.mask_T is None else conditions.mask_T.expand(batch, -1)
    windows = None if conditions is None else conditions.windows
    seen = noise if windows is None else noise[(..., *windows.first())]
    guided = GuidedVelocity(
        model, spec, prompts, noise, fps, negative_prompt, conditions, condition_noise
    )
    # Noise levels are those of clips that the model sees.
    spec = spec.replace(shift=spec.shift_for(seen.shape[2:]), shift_rule="constant")
    # Times reach the model in the precision of the noise.
    last = float(spec.sampling_times(noise.shape[2:])[-2].to(noise.dtype))
    cache = StepCache(batch, step_cache, last)
    with cached_steps(model, cache):
        return sample_ode(
            cache.around(guided if windows is None else windows.blend(guided)),
            noise,
            spec,
            condition_latents=latents,
            mask_BT=mask_BT,
            strength_T=strength_T,
            on_step=on_step,
        )


@torch.no_grad()
def sample_clips(
    model: nn.Module,
    vae: VideoVAE,
    spec: DiffusionSpec,
    prompts: list[str],
    shape: ClipShape,
    *,
    seed: int = 0,
    batch: int = CLIPS_AT_ONCE,
    on_batch: Callable[[int], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    negative_prompt: str | Sequence[str] = "",
    condition_frames: ConditionFrames | None = None,
    condition_noise: float = 0.0,
    step_cache: float = 0.0,
    numbers: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """One uint8 (T, H, W, 3) clip a prompt, or of those alone whose `numbers` are given.

    Prompt number i starts from noise keyed by (seed, i), so a clip does not depend on how many
    others are made with it. Under a sharded model every rank must call this with the same prompts.
    """
    device = next(vae.parameters()).device
    latent_shape = vae.latent_shape(shape.frames, shape.height, shape.width)
    conditions = (
        None if condition_frames is None else encode_conditions(condition_frames, vae, spec)
    )
    if spec.cond_mode == "concat" and conditions is None:
        # Such a model takes the channels without condition frames too.
        conditions = encode_conditions(no_condition_frames(shape, latent_shape[1]), vae, spec)
    negatives = one_each(negative_prompt, prompts)
    clips: list[np.ndarray] = []
    wanted = range(len(prompts)) if numbers is None else numbers
    for start in range(0, len(wanted), batch):
        rows = wanted[start : start + batch]
        chunk = [prompts[number] for number in rows]
        keys = [(0, number) for number in rows]
        latents = sample_latents(
            model,
            spec,
            chunk,
            draw_noise(seed, "sample", keys, latent_shape).to(device),
            shape.told_fps,
            negative_prompt=[negatives[number] for number in rows],
            conditions=conditions,
            condition_noise=condition_noise,
            step_cache=step_cache,
            on_step=on_step,
        )
        require_finite_latents(latents, dict(zip(rows, chunk, strict=True)), spec)
        clips += [decode_clip(vae, one) for one in latents]
        if on_batch is not None:
            on_batch(len(clips))
    return clips


def views_of(spec: DiffusionSpec, *, conditioned: bool) -> int:
    """How many rows of a guided call are one clip's: with caption, without it, and without condition frames too."""
    if conditioned and spec.condition_scale != 1.0:
        return 3
    scales = spec.guidance_scale, spec.guidance_scale_2 or spec.guidance_scale
    return 1 if scales == (1.0, 1.0) else 2


class GuidedVelocity:
    """The model's velocity under guidance: up to three calls of it in one batch.

    The null caption is the negative prompt, the encoded empty string where there is none. Without
    condition frames a clip is what it is in training when they are withheld: these frames are noisy
    like the others.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: DiffusionSpec,
        prompts: list[str],
        noise: Tensor,
        fps: float,
        negative_prompt: str | Sequence[str],
        conditions: ConditionLatents | None,
        condition_noise: float,
    ):
        assert isinstance(model, VideoDenoiser)
        self.model, self.spec, self.noise, self.fps = model, spec, noise, fps
        self.conditions, self.condition_noise = conditions, condition_noise
        mask_T = None if conditions is None else conditions.mask_T
        self.mask_BT = (
            noise.new_zeros(len(prompts), noise.shape[2])
            if mask_T is None
            else mask_T.to(noise).expand(len(prompts), -1)
        )
        conditioned = bool(self.mask_BT.any()) or (
            conditions is not None
            and conditions.channels is not None
            and spec.cond_mode == "concat"
        )
        # Below the boundary of two experts.
        self.scale_2 = spec.guidance_scale_2 or spec.guidance_scale
        views = views_of(spec, conditioned=conditioned)
        self.guided, self.by_condition = views > 1, views == 3
        nulls = one_each(negative_prompt, prompts)
        always = self.guided and (spec.guidance_from, spec.guidance_to) == (0.0, 1.0)
        self.plain = None if always else model.tokenize(prompts)
        copies = [*prompts, *nulls, *(nulls if self.by_condition else [])]
        self.text = model.tokenize(copies) if self.guided else None
        self.images = embedded_images(model, conditions)
        self._known: dict[tuple[bool, str], Text] = {}

    def __call__(self, z: Tensor, t_BT: Tensor, place: Place = WHOLE) -> Tensor:
        """v (B, C, T, H, W) from z of that shape and the noise level of each latent frame; z may be a window, at
        `place`."""
        t, expert = float(t_BT.max()), self.spec.expert_at(t_BT.max())
        scale = self.scale_2 if expert == "low" else self.spec.guidance_scale
        noise, mask_BT = self.noise[(..., *place)], self.mask_BT[:, place[0]]
        shown, t_shown_BT = self._with_conditions(z, t_BT, noise, mask_BT)
        guided = self.guided and self.spec.guidance_from <= t <= self.spec.guidance_to
        if not guided:
            assert self.plain is not None
            text = self._text(self.plain, expert, guided=False)
            return self._call([(shown, t_shown_BT, mask_BT, True)], text, expert)
        assert self.text is not None
        text = self._text(self.text, expert, guided=True)
        views = [(shown, t_shown_BT, mask_BT, True)] * 2
        if self.by_condition:
            views.append(self._without_conditions(z, t, noise, mask_BT))
        v, v_condition, *rest = self._call(views, text, expert).chunk(len(views))
        v_guided = (
            guide_both(v, v_condition, rest[0], scale, self.spec.condition_scale)
            if rest
            else guide(v, v_condition, scale)
        )
        if not self.spec.guidance_rescale:
            return v_guided
        return rescale(v_guided, v, self.spec.guidance_rescale, 1 - mask_BT)

    def _text(self, text: Text, expert: str, *, guided: bool) -> Text:
        """Captions as the model takes them; of one that stays as it is, with all done that is the same in each step."""
        if not getattr(self.model, "stays", False):
            return text
        assert isinstance(self.model, TextToVideo)
        key = guided, expert
        if key not in self._known:
            self._known[key] = self.model.know(text, expert)
        return self._known[key]

    def _with_conditions(
        self, z: Tensor, t_BT: Tensor, noise: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the model sees of condition frames: they may carry a little noise."""
        if self.condition_noise and bool(mask_BT.any()):
            is_condition = mask_BT > 0
            t_BT = torch.where(is_condition, torch.full_like(t_BT, self.condition_noise), t_BT)
            noisy = interpolate(z, noise, t_BT)
            z = torch.where(is_condition[:, None, :, None, None], noisy, z)
        return z, t_BT

    def _without_conditions(
        self, z: Tensor, t: float, noise: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, bool]:
        """The same clip on its way from noise, without conditions."""
        t_BT = torch.full_like(mask_BT, t)
        noisy = interpolate(z, noise, t_BT)
        z = torch.where((mask_BT > 0)[:, None, :, None, None], noisy, z)
        return z, t_BT, torch.zeros_like(mask_BT), False

    def _call(
        self,
        views: list[tuple[Tensor, Tensor, Tensor, bool]],
        text: Text,
        expert: str,
    ) -> Tensor:
        """One call of the model, or of its `expert`, for (z, t, mask, with conditions or without) in a batch."""
        z = torch.cat([self._with_channels(one[0], conditioned=one[3]) for one in views])
        mask_BT: Tensor | None = None
        if self.model.takes_mask:
            mask_BT = torch.cat([one[2] for one in views])
        fps_B = torch.full((len(z),), self.fps, device=z.device)
        t_BT = torch.cat([one[1] for one in views])
        beside: dict[str, Any] = {"expert": expert} if self.spec.expert == "both" else {}
        if self.images is not None:
            rows = [self.images[0 if one[3] else 1].expand(len(one[0]), -1, -1) for one in views]
            beside["images_BIE"] = torch.cat(rows)
        return self.model(z, t_BT, text, mask_BT=mask_BT, fps_B=fps_B, **beside)

    def _with_channels(self, z: Tensor, *, conditioned: bool) -> Tensor:
        """z, and with cond_mode=concat the condition channels after its own."""
        if self.conditions is None or self.conditions.channels is None:
            return z
        channels = self.conditions.channels if conditioned else self.conditions.null_channels
        assert channels is not None
        return torch.cat([z, channels.to(z).expand(len(z), -1, -1, -1, -1)], dim=1)


def one_each(negative_prompt: str | Sequence[str], prompts: Sequence[str]) -> list[str]:
    """The negative prompt of each prompt, where one may be for all."""
    if isinstance(negative_prompt, str):
        return [negative_prompt] * len(prompts)
    if len(negative_prompt) != len(prompts):
        raise ValueError(f"{len(negative_prompt)} negative prompts for {len(prompts)} prompts")
    return list(negative_prompt)


def embedded_images(
    model: nn.Module, conditions: ConditionLatents | None
) -> tuple[Tensor, Tensor] | None:
    """Embeddings (1, I, E) of the frames that a model is given in that form, and of a clip without condition frames;
    None for a model that is given none."""
    count = getattr(model, "images", 0)
    if not count:
        return None
    assert isinstance(model, TextToVideo)
    assert conditions is not None and conditions.frames is not None
    assert conditions.known_F is not None
    known = [conditions.known_F, np.zeros_like(conditions.known_F)]
    pictures = [pictures_of(conditions.frames, known_F, count)[None] for known_F in known]
    return model.embed_images(pictures[0]), model.embed_images(pictures[1])


def no_condition_frames(shape: ClipShape, num_frames: int) -> ConditionFrames:
    """`ConditionFrames` of a clip of which nothing is known; `num_frames` are latent ones."""
    blank = np.zeros((shape.frames, shape.height, shape.width, 3), np.uint8)
    return ConditionFrames(blank, "t2v", torch.zeros(num_frames))


class NoPicture(Fault):
    """What was sampled is not finite, so there is nothing to show."""


def require_finite_latents(latents: Tensor, prompts: dict[int, str], spec: DiffusionSpec) -> None:
    """Raises NoPicture naming the first clip, of those with these numbers, whose latents hold NaN or infinities."""
    for one, (number, prompt) in zip(latents, prompts.items(), strict=True):
        if not is_finite(one):
            raise NoPicture(
                f"the latents of clip {number} ('{prompt[:60]}') came out as NaN or infinite, so there is no picture; "
                "its weights may be (`sora ckpt verify RUN` names the tensor), else sample with "
                f"less guidance than guidance_scale={spec.guidance_scale:g}"
            )


def decode_clip(vae: VideoVAE, latents_CTHW: Tensor) -> np.ndarray:
    """uint8 (T, H, W, 3): a byte a value is all that grows with the clip. Raises NoPicture where the VAE's values are
    not finite."""
    frames = 1 + (latents_CTHW.shape[1] - 1) * vae.temporal_factor
    height, width = (size * vae.spatial_factor for size in latents_CTHW.shape[-2:])
    clip = np.empty((frames, height, width, 3), np.uint8)
    for where, pixels in vae.decode_pieces(latents_CTHW[None]):
        if not is_finite(pixels):
            raise NoPicture(
                f"the VAE made NaN or infinite pixels of finite latents in {vae.dtype}; set vae.dtype=float32"
            )
        clip[where[1:]] = to_uint8(pixels[0])
    return clip
