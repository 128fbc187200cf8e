"""The objective of text to video: rectified flow on the latents of captioned clips."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sora_train.config import Config
from sora_train.data.sample import Clip, ClipBatch, MicroBatch
from sora_train.device.clock import DeviceClock
from sora_train.device.transfer import to_device
from sora_train.diffusion.condition_frames import (
    condition_channels,
    encode_condition_frames,
    encode_whole,
    pixel_mask,
    there_and_back,
)
from sora_train.diffusion.condition_masks import HEAD_KINDS
from sora_train.diffusion.draws import SampleKey, draw_noise, draw_uniform
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import ConfigError, UserError
from sora_train.models.adapters.dropout import draw_dropout
from sora_train.models.image_encoder import pictures_of
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.work_sharing import NO_SHARING, WorkSharing
from sora_train.objectives.base import LossTerm, Objective, SampleInfo
from sora_train.objectives.clips import placeholder, stored_text, to_pixels, without_pixels
from sora_train.objectives.flow_batch import FlowBatch
from sora_train.objectives.noise_ahead import NoiseAhead
from sora_train.objectives.posterior import draw_latents, encode_posterior
from sora_train.objectives.sample_draws import SampleDraws, draw_samples, frame_masks
from sora_train.objectives.validation import validated_kinds, validation_loss
from sora_train.runtime.control_plane import ControlPlane

PROBE_TIME = 0.5
DRAWS_KEPT = 256
"""Micro-batches whose draws are at hand: weights, terms and descriptions of a step all ask for them."""


class TextToVideoObjective(Objective):
    """Rectified flow on the latents of captioned clips."""

    def __init__(
        self,
        cfg: Config,
        spec: DiffusionSpec,
        vae: VideoVAE,
        device: torch.device,
        sharing: WorkSharing = NO_SHARING,
    ):
        """`sharing` shares the frozen networks' work among the ranks that hold the same clips."""
        self.cfg = cfg
        self.spec = spec
        self.validated_times = [t for t in cfg.validation.times if spec.computes(t)]
        if not self.validated_times:
            raise ConfigError(
                f"validation.times={list(cfg.validation.times)} has no noise level on the side of model.boundary="
                f"{spec.boundary:g} that model.expert={spec.expert} is trained on; give some that are"
            )
        self.vae = vae
        self.device = device
        self.sharing = sharing
        self.encoding = DeviceClock(device)
        pinned = device.type == "cuda"
        self.noise = NoiseAhead(functools.partial(draw_noise, cfg.seed, "noise", pinned=pinned))
        self._draw = functools.lru_cache(DRAWS_KEPT)(
            functools.partial(draw_samples, spec, cfg.seed)
        )

    # --- the loss ---

    def weights(self, batch: ClipBatch) -> dict[str, float]:
        """Good clips, or with `loss.reduce=per_token` their video tokens that are not conditions."""
        if self.cfg.loss.reduce == "per_sample":
            return {"velocity": batch.weight}
        return {"velocity": sum(self.counted_tokens(batch), 0.0)}

    def terms(self, model: nn.Module, batch: ClipBatch) -> dict[str, LossTerm]:
        # Not self.weights(): a subclass may give its terms other names.
        weight = TextToVideoObjective.weights(self, batch)["velocity"]
        flow = self.towards(model, self.flow_batch(batch))
        if self.cfg.adapter.dropout:
            draw_dropout(model, self.cfg.seed, sample_keys(batch.clips or placeholder(batch)))
        if self.cfg.loss.reduce == "per_sample":
            losses_B = flow.losses(model)
            loss_sum = losses_B.sum()
        else:
            tokens = self.token_grid(batch)[1]
            losses_BT = flow.frame_losses(model)
            loss_sum, losses_B = losses_BT.sum() * tokens, losses_BT.sum(dim=1) * tokens
        info = self.describe(batch)
        return {"velocity": LossTerm(loss_sum * float(weight > 0), weight, losses_B.detach(), info)}

    def token_grid(self, batch: ClipBatch) -> tuple[int, int]:
        """Latent frames of the batch's clips, and video tokens of each frame."""
        _, p, q = self.cfg.model.patch_size
        frames, rows, columns = self.latent_size(batch)
        return frames, (rows // p) * (columns // q)

    def latent_size(self, batch: ClipBatch) -> tuple[int, int, int]:
        """Frames, rows and columns of the latents of the batch's clips."""
        bucket = batch.micro_batch.bucket
        _, frames, rows, columns = self.vae.latent_shape(bucket.frames, bucket.height, bucket.width)
        return frames, rows, columns

    def flow_batch(self, batch: ClipBatch) -> FlowBatch:
        """The batch on its way to noise, every draw keyed by sample."""
        clips, draws = batch.clips or placeholder(batch), self.draws(batch)
        with self.encoding.running():
            encoded = self.encode_batch(
                clips,
                draws.kinds,
                draws.mask_BT,
                sample_posterior=self.cfg.data.latents == "sample",
            )
        x = encoded.x
        noise = self.noise.take(sample_keys(clips), tuple(x.shape[1:]))
        return FlowBatch(
            x=x,
            noise=to_device(noise, x.device),
            t_B=to_device(draws.t_B, x.device),
            mask_BT=encoded.mask_BT,
            prompts=draws.prompts,
            fps_B=to_device(torch.tensor([clip.fps for clip in clips]), x.device),
            text=stored_text(clips, draws.prompts),
            condition_latents=encoded.condition_latents,
            condition_channels=encoded.condition_channels,
            pictures=encoded.pictures,
            expert=self.expert_of(batch) if self.spec.expert == "both" else "",
            t_cond_B=to_device(draws.t_cond_B, x.device),
            t_BT=None if draws.t_BT is None else to_device(draws.t_BT, x.device),
            time_weight=to_device(self.spec.loss_weight(draws.levels), x.device),
            sharing=self.sharing,
            encoding=self.encoding,
        )

    def towards(self, model: nn.Module, flow: FlowBatch) -> FlowBatch:
        """The batch on the path whose velocity the model is to have: that from data to noise it is on already."""
        return flow

    def expect(self, micro_batches: Sequence[MicroBatch]) -> None:
        self.noise.expect(
            [
                (
                    tuple(zip(entry.epochs, entry.rows, strict=True)),
                    self.vae.latent_shape(
                        entry.bucket.frames, entry.bucket.height, entry.bucket.width
                    ),
                )
                for entry in micro_batches
            ]
        )

    def take_encode_seconds(self) -> float:
        return self.encoding.take()

    # --- what chance decides ---

    def draws(self, batch: ClipBatch) -> SampleDraws:
        """What chance decides about each clip of a batch, or about the placeholder of an empty one."""
        clips = batch.clips or placeholder(batch)
        captions = tuple(clip.caption for clip in clips)
        return self._draw(
            sample_keys(clips), captions, self.latent_size(batch), self.expert_of(batch)
        )

    def expert_of(self, batch: ClipBatch) -> str:
        """The expert that a batch trains. Of both the one and the other have a step of the tape in turn, the high-noise
        expert the first, so all micro-batches of a step, on all ranks, train the same."""
        if self.spec.expert != "both":
            return self.spec.expert
        step = batch.micro_batch.index // self.cfg.train.micro_batches
        return "low" if step % 2 else "high"

    def describe(self, batch: ClipBatch) -> list[SampleInfo]:
        if not batch.clips:
            return []
        draws, per_sample = self.draws(batch), self.cfg.loss.reduce == "per_sample"
        of_each = zip(
            draws.prompts,
            draws.kinds,
            map(tuple, draws.mask_BT.int().tolist()),
            draws.t_B.tolist(),
            draws.t_cond_B.tolist(),
            [1.0] * len(batch.clips) if per_sample else self.counted_tokens(batch),
            strict=True,
        )
        return [SampleInfo(*values) for values in of_each]

    def counted_tokens(self, batch: ClipBatch) -> list[float]:
        """Video tokens of each clip that the loss is about."""
        if not batch.clips:
            return []
        num_frames, tokens = self.token_grid(batch)
        # With cond_mode=concat conditions are inputs of their own, and every frame is generated.
        if self.spec.cond_mode == "concat":
            return [float(num_frames * tokens)] * len(batch.clips)
        conditions: list[float] = self.draws(batch).mask_BT.sum(dim=1).tolist()
        return [(num_frames - count) * tokens for count in conditions]

    # --- held-out clips ---

    def validate(
        self,
        model: nn.Module,
        clips: list[Clip],
        control: ControlPlane,
        check_preemption: Callable[[], None] = lambda: None,
        *,
        live: bool = False,
    ) -> dict[str, float]:
        """The loss by kind, bucket and noise level, and with `live` that of the first kind; see validation.py."""
        times, kinds = self.validated_times, validated_kinds(self.cfg)
        return validation_loss(
            lambda batch, kind: self.losses_at(model, batch, kind, times),
            self.vae,
            clips,
            times,
            kinds[:1] if live else kinds,
            control,
            check_preemption,
        )

    @torch.no_grad()
    def probe_loss(self, model: nn.Module, clips: list[Clip]) -> float:
        edge = self.spec.boundary
        t = {"high": (1 + edge) / 2, "low": edge / 2}.get(self.spec.expert, PROBE_TIME)
        return self.losses_at(model, clips, "t2v", [t])[0]

    def losses_at(
        self, model: nn.Module, clips: list[Clip], kind: str, times: Sequence[float]
    ) -> list[float]:
        """Sum of the losses of clips of one shape at each noise level, with noise and masks that validation draws."""
        return [float(losses_B.sum()) for losses_B in self.clip_losses(model, clips, kind, times)]

    def clip_losses(
        self, model: nn.Module, clips: list[Clip], kind: str, times: Sequence[float]
    ) -> list[Tensor]:
        """Each clip's loss (B,) at each noise level; its noise and mask depend on its row alone, not on its caption."""
        seed, keys = self.cfg.seed, [(0, clip.row) for clip in clips]
        kinds, prompts = [kind] * len(clips), [clip.caption for clip in clips]
        x = self.latents(clips, kinds)
        uniform = draw_uniform(seed, f"validation mask {kind}", keys).tolist()
        encoded = self.with_conditions(clips, kinds, frame_masks(kinds, x.shape[2], uniform), x)
        losses = []
        for t in times:
            flow = FlowBatch(
                x=x,
                noise=draw_noise(seed, f"validation {t}", keys, x.shape[1:]).to(x.device),
                t_B=torch.full((len(clips),), t, device=x.device),
                mask_BT=encoded.mask_BT,
                prompts=prompts,
                fps_B=torch.tensor([clip.fps for clip in clips], device=x.device),
                text=stored_text(clips, prompts),
                condition_latents=encoded.condition_latents,
                condition_channels=encoded.condition_channels,
                pictures=encoded.pictures,
                expert=self.spec.expert_at(torch.tensor(t)) if self.spec.expert == "both" else "",
                sharing=self.sharing,
            )
            losses.append(self.towards(model, flow).losses(model))
        return losses

    # --- latents ---

    def encode_batch(
        self,
        clips: list[Clip],
        kinds: list[str],
        mask_BT: Tensor,
        *,
        sample_posterior: bool = False,
    ) -> "ConditionedLatents":
        """Latents of clips of one shape and of the frames in `mask_BT` that are their conditions.

        Args:
            sample_posterior: draw latents from the VAE's posterior instead of taking its mean.
        """
        x = self.latents(clips, kinds, sample_posterior)
        return self.with_conditions(clips, kinds, mask_BT, x, drawn=sample_posterior)

    def with_conditions(
        self,
        clips: list[Clip],
        kinds: list[str],
        mask_BT: Tensor,
        x: Tensor,
        *,
        drawn: bool = False,
    ) -> "ConditionedLatents":
        """Latents `x` of the clips, and their condition frames encoded as sampling encodes them: by themselves, the
        posterior's mean. `drawn`: x are draws."""
        rows = list(zip(clips, kinds, mask_BT, strict=True))
        mask_BT = to_device(mask_BT, x.device)
        if self.spec.cond_mode == "concat":
            channels = torch.cat(self.sharing(rows, lambda row: self.condition_channels_of(*row)))
            return ConditionedLatents(x, mask_BT, None, channels, self.pictures_of(rows))
        # With a causal VAE the first frames depend on no later ones, so their latents are the clip's own.
        own = HEAD_KINDS if self.vae.causal and not drawn else ("t2v",)
        apart = [row for row, kind in enumerate(kinds) if kind not in own]
        if not apart:
            return ConditionedLatents(x, mask_BT, None, None)
        encoded = self.sharing(apart, lambda row: self.condition_latents_of(*rows[row]))
        condition_latents = x.clone()
        for row, latents in zip(apart, encoded, strict=True):
            condition_latents[row] = latents[0]
        return ConditionedLatents(x, mask_BT, condition_latents, None)

    @torch.no_grad()
    def condition_latents_of(self, clip: Clip, kind: str, mask_T: Tensor) -> Tensor:
        """Latents (1, C, T, H, W) of a clip's condition frames, each run from its own pixels, or from stored means
        where they are the same."""
        vae = self.vae
        if clip.latents is not None and kind in HEAD_KINDS and vae.causal:
            return self.latents_of(clip)
        known_F = pixel_mask(kind, mask_T, vae.temporal_factor)
        pixels = self.pixels_of(clip, kind)
        return encode_condition_frames(
            vae.encode, pixels, known_F, vae.temporal_factor, vae.frame_step
        ).float()

    @torch.no_grad()
    def condition_channels_of(self, clip: Clip, kind: str, mask_T: Tensor) -> Tensor:
        """Condition channels (1, factor + C, T, H, W) of one clip."""
        known_F = pixel_mask(kind, mask_T, self.vae.temporal_factor).to(self.device)
        latents = encode_whole(self.vae.encode, self.pixels_of(clip, kind), known_F).float()
        return condition_channels(latents, known_F[None], self.vae.temporal_factor)

    def pictures_of(self, rows: list[tuple[Clip, str, Tensor]]) -> np.ndarray | None:
        """The first frames of clips, and where the model takes two the last ones, uint8 (B, N, height, width, 3), grey
        where they are not among the given ones; None for a model that takes none."""
        count = self.cfg.model.images
        if not count:
            return None
        found = []
        for clip, kind, mask_T in rows:
            known_F = pixel_mask(kind, mask_T, self.vae.temporal_factor).numpy()
            assert clip.pixels is not None, "condition channels were made of them"
            frames = there_and_back(torch.from_numpy(clip.pixels), dim=0).numpy()
            found.append(pictures_of(frames if kind == "loop" else clip.pixels, known_F, count))
        return np.stack(found)

    def pixels_of(self, clip: Clip, kind: str) -> Tensor:
        """Pixels (1, 3, F, H, W) of a clip as its kind plays it. Raises UserError without pixels."""
        if clip.pixels is None:
            raise UserError(
                f"clip {clip.row} comes as stored latents, and conditioning '{kind}' encodes condition frames from "
                "pixels of their own; set data.stored_latents=ignore and data.cache=none, or "
                f"{without_pixels(self.vae)}"
            )
        pixels = to_pixels([clip], self.device)
        return there_and_back(pixels, dim=2) if kind == "loop" else pixels

    def latents(
        self, clips: list[Clip], kinds: list[str], sample_posterior: bool = False
    ) -> Tensor:
        """Normalised latents (B, C, T, H, W) of clips as their kinds play them."""
        latents_of = self.drawn_latents_of if sample_posterior else self.latents_of
        pairs = list(zip(clips, kinds, strict=True))
        # What is stored is at hand everywhere; to encode is work.
        work = [
            row for row, (clip, kind) in enumerate(pairs) if clip.latents is None or kind == "loop"
        ]
        made = dict(zip(work, self.sharing(work, lambda row: latents_of(*pairs[row])), strict=True))
        return torch.cat(
            [made[row] if row in made else latents_of(*pair) for row, pair in enumerate(pairs)]
        )

    @torch.no_grad()
    def latents_of(self, clip: Clip, kind: str = "t2v") -> Tensor:
        """Normalised latents (1, C, T, H, W) of one clip, float32: stored ones, or encoded now.

        Encoded one by one, so that a clip's latents never depend on its neighbours in the batch.
        """
        if clip.latents is not None and kind != "loop":
            return to_device(torch.from_numpy(clip.latents)[None], self.device)
        return self.vae.encode(self.pixels_of(clip, kind)).float()

    @torch.no_grad()
    def drawn_latents_of(self, clip: Clip, kind: str = "t2v") -> Tensor:
        """A draw (1, C, T, H, W) from the posterior of one clip, stored or encoded now, keyed by its epoch and row."""
        if clip.latents is None or kind == "loop":
            mean, logvar = encode_posterior(self.vae, self.pixels_of(clip, kind))
        else:
            assert clip.logvar is not None, "stored latents that are drawn from have a log-variance"
            mean, logvar = (
                to_device(torch.from_numpy(part)[None], self.device)
                for part in (clip.latents, clip.logvar)
            )
        return draw_latents(mean, logvar, self.cfg.seed, [(clip.epoch, clip.row)])


@dataclass(frozen=True)
class ConditionedLatents:
    """Clean latents (B, C, T, H, W) of clips and their condition frames: see FlowBatch."""

    x: Tensor
    mask_BT: Tensor
    condition_latents: Tensor | None
    condition_channels: Tensor | None
    pictures: np.ndarray | None = None


def sample_keys(clips: list[Clip]) -> tuple[SampleKey, ...]:
    """What the draws of clips are keyed by."""
    return tuple((clip.epoch, clip.row) for clip in clips)
