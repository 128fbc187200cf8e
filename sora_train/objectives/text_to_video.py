"""The objective of text to video: rectified flow on the latents of captioned clips."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sora_train.config import Config
from sora_train.data.sample import Clip, ClipBatch
from sora_train.diffusion.condition_frames import (
    condition_channels,
    encode_given,
    encode_whole,
    pixel_mask,
    there_and_back,
)
from sora_train.diffusion.condition_masks import (
    HEAD_KINDS,
    choose_kind,
    condition_times,
    frame_mask,
    kind_for,
)
from sora_train.diffusion.draws import draw_noise, draw_uniform
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import UserError
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.work_sharing import ALONE, Spread
from sora_train.objectives.base import LossTerm, Objective, SampleDraws, SampleInfo
from sora_train.objectives.clips import placeholder, stored_text, to_pixels
from sora_train.objectives.flow_batch import FlowBatch
from sora_train.objectives.posterior import draw_latents, encode_posterior
from sora_train.objectives.validation import validated_kinds, validation_loss
from sora_train.runtime.control_plane import ControlPlane

PROBE_TIME = 0.5
"""Noise level of the loss that checkpoints are compared by."""


class TextToVideoObjective(Objective):
    """Rectified flow on the latents of captioned clips."""

    def __init__(
        self,
        cfg: Config,
        spec: DiffusionSpec,
        vae: VideoVAE,
        device: torch.device,
        spread: Spread = ALONE,
    ):
        """`spread` deals out what the frozen networks have to do among those who hold the same clips."""
        self.cfg = cfg
        self.spec = spec
        self.vae = vae
        self.device = device
        self.spread = spread

    def weights(self, batch: ClipBatch) -> dict[str, float]:
        """Good clips, or with `loss.reduce=per_token` their video tokens that are not given."""
        if self.cfg.loss.reduce == "per_sample":
            return {"velocity": batch.weight}
        if not batch.clips:
            return {"velocity": 0.0}
        num_frames, tokens = self.token_grid(batch)
        frames = float(len(batch.clips) * num_frames)
        if self.spec.cond_mode == "replace":
            keys = [(clip.epoch, clip.row) for clip in batch.clips]
            frames -= float(self.given_frames(keys, num_frames).sum())
        return {"velocity": frames * tokens}

    def terms(self, model: nn.Module, batch: ClipBatch) -> dict[str, LossTerm]:
        # Not self.weights(): who derives from this class may name its terms otherwise.
        weight = TextToVideoObjective.weights(self, batch)["velocity"]
        flow = self.flow_batch(batch)
        if self.cfg.loss.reduce == "per_sample":
            losses_B = flow.losses(model)
            loss_sum, weights_B = losses_B.sum(), torch.ones(len(losses_B))
        else:
            tokens = self.token_grid(batch)[1]
            losses_BT = flow.frame_losses(model)
            loss_sum, losses_B = losses_BT.sum() * tokens, losses_BT.sum(dim=1) * tokens
            weights_B = flow.counted_BT.sum(dim=1) * tokens
        told = SampleInfo(flow.t_B, flow.kinds, weights_B) if flow.kinds else None
        return {"velocity": LossTerm(loss_sum * float(weight > 0), weight, losses_B.detach(), told)}

    def token_grid(self, batch: ClipBatch) -> tuple[int, int]:
        """Latent frames of the batch's clips, and video tokens of each frame."""
        bucket, (_, p, q) = batch.micro_batch.bucket, self.cfg.model.patch_size
        _, frames, rows, columns = self.vae.latent_shape(bucket.frames, bucket.height, bucket.width)
        return frames, (rows // p) * (columns // q)

    def flow_batch(self, batch: ClipBatch) -> "FlowBatch":
        """The batch on its way to noise, every draw keyed by sample."""
        clips = batch.clips or placeholder(batch)
        drawn = self.describe(batch)
        shown = self.encode_batch(
            clips,
            drawn.kinds,
            self.kind_draws(drawn.keys),
            self.cfg.data.latents == "sample",
        )
        x = shown.x
        return FlowBatch(
            x=x,
            noise=draw_noise(self.cfg.seed, "noise", drawn.keys, x.shape[1:]).to(x.device),
            t_B=drawn.t_B.to(x.device),
            mask_BT=shown.mask_BT,
            prompts=drawn.prompts,
            fps_B=torch.tensor([clip.fps for clip in clips], device=x.device),
            text=stored_text(clips, drawn.prompts),
            given=shown.given,
            condition=shown.condition,
            t_cond_B=drawn.t_cond_B.to(x.device),
            time_weight_B=self.spec.loss_weight(drawn.t_B).to(x.device),
            spread=self.spread,
            kinds=drawn.kinds,
        )

    def describe(self, batch: ClipBatch) -> SampleDraws:
        """What chance decides about each clip of a batch; nothing is encoded for it."""
        clips = batch.clips or placeholder(batch)
        bucket, keys = batch.micro_batch.bucket, [(clip.epoch, clip.row) for clip in clips]
        shape = self.vae.latent_shape(bucket.frames, bucket.height, bucket.width)[1:]
        return SampleDraws(
            keys=keys,
            kinds=self.kinds(keys, shape[0]),
            mask_BT=self.given_frames(keys, shape[0]),
            t_B=self.spec.training_times(draw_uniform(self.cfg.seed, "timestep", keys), shape),
            t_cond_B=self.condition_times(keys),
            prompts=self.drop_captions([clip.caption for clip in clips], keys),
        )

    def given_frames(self, keys: list[tuple[int, int]], num_frames: int) -> Tensor:
        """Mask (B, T) of the latent frames each sample is given, by the spec's conditioning."""
        kinds = self.kinds(keys, num_frames)
        return frame_masks(kinds, num_frames, self.kind_draws(keys))

    def kinds(self, keys: list[tuple[int, int]], num_frames: int) -> list[str]:
        """The kind of conditioning of each sample, `t2v` where it is dropped."""
        u_kind = draw_uniform(self.cfg.seed, "cond_kind", keys).tolist()
        u_drop = draw_uniform(self.cfg.seed, "cond_dropout", keys).tolist()
        return [
            "t2v"
            if drop < self.spec.condition_dropout
            else kind_for(choose_kind(self.spec.conditioning, kind), num_frames)
            for kind, drop in zip(u_kind, u_drop, strict=True)
        ]

    def kind_draws(self, keys: list[tuple[int, int]]) -> list[float]:
        """What decides how many frames a kind gives, and which."""
        draws: list[float] = draw_uniform(self.cfg.seed, "cond_mask", keys).tolist()
        return draws

    def condition_times(self, keys: list[tuple[int, int]]) -> Tensor:
        """Noise level (B,) of each sample's given frames."""
        return condition_times(
            draw_uniform(self.cfg.seed, "cond_noise", keys),
            draw_uniform(self.cfg.seed, "cond_noise_level", keys),
            self.spec.condition_noise_share,
            self.spec.condition_noise_max,
        )

    def encode_batch(
        self, clips: list[Clip], kinds: list[str], draws: list[float], drawn: bool = False
    ) -> "ConditionedLatents":
        """Latents of clips of one shape, `drawn` from their posteriors or its means, and what each is given
        of itself by its kind."""
        x = self.latents(clips, kinds, drawn)
        mask_BT = frame_masks(kinds, x.shape[2], draws)
        shown = zip(clips, kinds, mask_BT, x, strict=True)
        if self.spec.cond_mode == "concat":
            condition = torch.cat(self.spread(list(shown), lambda one: self.condition_of(*one[:3])))
            return ConditionedLatents(x, mask_BT.to(x.device), None, condition)
        if all(kind in HEAD_KINDS for kind in kinds):
            return ConditionedLatents(x, mask_BT.to(x.device), None, None)
        rows = list(shown)
        apart = [row for row, kind in enumerate(kinds) if kind not in HEAD_KINDS]
        made = self.spread(apart, lambda row: self.given_of(*rows[row][:3]))
        given = x.clone()
        for row, one in zip(apart, made, strict=True):
            given[row] = one[0]
        return ConditionedLatents(x, mask_BT.to(x.device), given, None)

    @torch.no_grad()
    def given_of(self, clip: Clip, kind: str, mask_T: Tensor) -> Tensor:
        """Latents (1, C, T, H, W) of the frames a clip is given, each run from its own pixels."""
        vae = self.vae
        known_F = pixel_mask(kind, mask_T, vae.temporal_factor)
        pixels = self.pixels_of(clip, kind)
        return encode_given(
            vae.encode, pixels, known_F, vae.temporal_factor, vae.frame_step
        ).float()

    @torch.no_grad()
    def condition_of(self, clip: Clip, kind: str, mask_T: Tensor) -> Tensor:
        """Condition channels (1, factor + C, T, H, W) of one clip."""
        known_F = pixel_mask(kind, mask_T, self.vae.temporal_factor).to(self.device)
        given = encode_whole(self.vae.encode, self.pixels_of(clip, kind), known_F).float()
        return condition_channels(given, known_F[None], self.vae.temporal_factor)

    def pixels_of(self, clip: Clip, kind: str) -> Tensor:
        """Pixels (1, 3, F, H, W) of a clip as its kind plays it. Raises UserError without pixels."""
        if clip.pixels is None:
            raise UserError(
                f"clip {clip.row} comes as stored latents, and conditioning '{kind}' encodes given frames from "
                "pixels of their own; set data.stored_latents=ignore and data.cache=none, or train t2v, i2v and "
                "extend with objective.cond_mode=replace only"
            )
        pixels = to_pixels([clip], self.device)
        return there_and_back(pixels, dim=2) if kind == "loop" else pixels

    def latents(self, clips: list[Clip], kinds: list[str], drawn: bool = False) -> Tensor:
        """Normalised latents (B, C, T, H, W) of clips as their kinds play them."""
        latents_of = self.drawn_latents_of if drawn else self.latents_of
        pairs = list(zip(clips, kinds, strict=True))
        # What is stored is at hand everywhere; to encode is work.
        work = [
            row for row, (clip, kind) in enumerate(pairs) if clip.latents is None or kind == "loop"
        ]
        made = dict(zip(work, self.spread(work, lambda row: latents_of(*pairs[row])), strict=True))
        return torch.cat(
            [made[row] if row in made else latents_of(*pair) for row, pair in enumerate(pairs)]
        )

    @torch.no_grad()
    def latents_of(self, clip: Clip, kind: str = "t2v") -> Tensor:
        """Normalised latents (1, C, T, H, W) of one clip, float32: stored ones, or encoded now.

        Encoded one by one, so that a clip's latents never depend on its neighbours in the batch.
        """
        if clip.latents is not None and kind != "loop":
            return torch.from_numpy(clip.latents)[None].to(self.device)
        return self.vae.encode(self.pixels_of(clip, kind)).float()

    @torch.no_grad()
    def drawn_latents_of(self, clip: Clip, kind: str = "t2v") -> Tensor:
        """A draw (1, C, T, H, W) from the posterior of one clip, stored or encoded now, keyed by its epoch and row."""
        if clip.latents is None or kind == "loop":
            mean, logvar = encode_posterior(self.vae, self.pixels_of(clip, kind))
        else:
            assert clip.logvar is not None, "stored latents that are drawn from have a log-variance"
            mean, logvar = (
                torch.from_numpy(part)[None].to(self.device) for part in (clip.latents, clip.logvar)
            )
        return draw_latents(mean, logvar, self.cfg.seed, [(clip.epoch, clip.row)])

    def drop_captions(self, prompts: list[str], keys: list[tuple[int, int]]) -> list[str]:
        """The null caption is the encoded empty string."""
        u_B = draw_uniform(self.cfg.seed, "caption_dropout", keys).tolist()
        return [
            "" if u < self.spec.caption_dropout else prompt
            for u, prompt in zip(u_B, prompts, strict=True)
        ]

    # --- validation ---

    def validate(
        self,
        model: nn.Module,
        clips: list[Clip],
        control: ControlPlane,
        check_preemption: Callable[[], None],
        live: bool = False,
    ) -> dict[str, float]:
        """The loss at the noise levels of `validation.times`, for every kind of conditioning; live: of the first."""
        kinds = validated_kinds(self.cfg)
        return validation_loss(
            model,
            self,
            clips,
            self.cfg.validation.times,
            kinds[:1] if live else kinds,
            control,
            check_preemption,
        )

    @torch.no_grad()
    def probe_loss(self, model: nn.Module, clips: list[Clip]) -> float:
        return self.losses_at(model, clips, "t2v", [PROBE_TIME])[0]

    def losses_at(
        self, model: nn.Module, batch: list[Clip], kind: str, times: Sequence[float]
    ) -> list[float]:
        """Sum of the clips' losses at each noise level; the draws are validation's own."""
        seed, keys = self.cfg.seed, [(0, clip.row) for clip in batch]
        draws = draw_uniform(seed, f"validation mask {kind}", keys).tolist()
        shown = self.encode_batch(batch, [kind] * len(batch), draws)
        x, prompts, sums = shown.x, [clip.caption for clip in batch], []
        for t in times:
            flow = FlowBatch(
                x=x,
                noise=draw_noise(seed, f"validation {t}", keys, x.shape[1:]).to(x.device),
                t_B=torch.full((len(batch),), t, device=x.device),
                mask_BT=shown.mask_BT,
                prompts=prompts,
                fps_B=torch.tensor([clip.fps for clip in batch], device=x.device),
                text=stored_text(batch, prompts),
                given=shown.given,
                condition=shown.condition,
                spread=self.spread,
            )
            sums.append(float(flow.loss_sum(model)))
        return sums


def frame_masks(kinds: list[str], num_frames: int, draws: list[float]) -> Tensor:
    """Mask (B, T) of the latent frames that each kind gives."""
    pairs = zip(kinds, draws, strict=True)
    return torch.stack([frame_mask(kind, num_frames, u) for kind, u in pairs])


@dataclass(frozen=True)
class ConditionedLatents:
    """Clean latents (B, C, T, H, W) of clips and what is given of them: see FlowBatch."""

    x: Tensor
    mask_BT: Tensor
    given: Tensor | None
    condition: Tensor | None
