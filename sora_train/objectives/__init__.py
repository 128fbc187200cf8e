"""What is minimised: from this rank's clips to named terms, each a sum with its weight.

A term's weight is announced before the first forward of a step, so that the true total over all
ranks and micro-batches is known before the first backward and the loss is scaled in one place.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sora_train.config import Config, VaeObjectiveConfig
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
    frame_times,
    kind_for,
)
from sora_train.diffusion.draws import draw_noise, draw_uniform
from sora_train.diffusion.flow import frame_losses, interpolate, token_loss, velocity_losses
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.errors import UserError
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.vae.lpips import Lpips
from sora_train.models.work_sharing import ALONE, Spread
from sora_train.objectives.adversary import Adversary
from sora_train.objectives.posterior import draw_latents, encode_posterior


@dataclass(frozen=True)
class Told:
    """Of each clip of a term, in the order of `of_samples`: its noise level, kind of conditioning, and weight."""

    times: Tensor
    kinds: list[str]
    weights: Tensor


@dataclass(frozen=True)
class Term:
    """A differentiable sum over samples and the number of samples (or what else) it is a sum of."""

    sum: Tensor
    weight: float
    of_samples: Tensor | None = None
    """Each clip's part of the sum, (B,), without gradient, where the objective tells it: what a replay shows."""
    clips: Told | None = None
    """What the losses of the clips are told apart by, where the objective tells it."""


class Objective(Protocol):
    """Subclass or write your own: see docs/extend.md."""

    def weights(self, batch: ClipBatch) -> dict[str, float]:
        """Weight of every term for this micro-batch, known without any forward."""

    def terms(self, model: nn.Module, batch: ClipBatch) -> dict[str, Term]:
        """The same names with their differentiable sums; the loss is the sum of sum / total weight."""

    # What an objective with weights of its own to train does besides; most have none.

    def step(self) -> dict[str, float]:
        """Called once for every step that is taken, just before the weights change: update what is the
        objective's own. A collective; returns metrics of the step, the same on every rank."""
        return {}

    def skip(self) -> None:
        """Called in its place for a step that is not taken: forget what was gathered for it."""
        return

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of its own that a checkpoint holds, loadable in place, the same on every rank."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint tells of the objective besides: the frozen weights that the loss was made with."""
        return {}

    def require_same(self, state: dict[str, Any]) -> None:
        """Raises UserError where a checkpoint's `state` tells other facts than this run's."""
        before = state.get("objective", {})
        for name, value in self.facts().items():
            if before.get(name, value) != value:
                raise UserError(
                    f"the checkpoint of step {state['step']} was trained with {name}={before[name]}, and here it is "
                    f"{value}; give the same file to go on, or another run.dir to start anew"
                )


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

    def terms(self, model: nn.Module, batch: ClipBatch) -> dict[str, Term]:
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
        told = Told(flow.t_B, flow.kinds, weights_B) if flow.kinds else None
        return {"velocity": Term(loss_sum * float(weight > 0), weight, losses_B.detach(), told)}

    def token_grid(self, batch: ClipBatch) -> tuple[int, int]:
        """Latent frames of the batch's clips, and video tokens of each frame."""
        bucket, (_, p, q) = batch.micro_batch.bucket, self.cfg.model.patch_size
        _, frames, rows, columns = self.vae.latent_shape(bucket.frames, bucket.height, bucket.width)
        return frames, (rows // p) * (columns // q)

    def flow_batch(self, batch: ClipBatch) -> "FlowBatch":
        """The batch on its way to noise, every draw keyed by sample."""
        clips = batch.clips or placeholder(batch)
        drawn = self.draws(batch)
        shown = self.shown(
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

    def draws(self, batch: ClipBatch) -> "Draws":
        """What chance decides about each clip of a batch; nothing is encoded for it."""
        clips = batch.clips or placeholder(batch)
        bucket, keys = batch.micro_batch.bucket, [(clip.epoch, clip.row) for clip in clips]
        shape = self.vae.latent_shape(bucket.frames, bucket.height, bucket.width)[1:]
        return Draws(
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

    def shown(
        self, clips: list[Clip], kinds: list[str], draws: list[float], drawn: bool = False
    ) -> "Shown":
        """Latents of clips of one shape, `drawn` from their posteriors or its means, and what each is given
        of itself by its kind."""
        x = self.latents(clips, kinds, drawn)
        mask_BT = frame_masks(kinds, x.shape[2], draws)
        shown = zip(clips, kinds, mask_BT, x, strict=True)
        if self.spec.cond_mode == "concat":
            condition = torch.cat(self.spread(list(shown), lambda one: self.condition_of(*one[:3])))
            return Shown(x, mask_BT.to(x.device), None, condition)
        if all(kind in HEAD_KINDS for kind in kinds):
            return Shown(x, mask_BT.to(x.device), None, None)
        rows = list(shown)
        apart = [row for row, kind in enumerate(kinds) if kind not in HEAD_KINDS]
        made = self.spread(apart, lambda row: self.given_of(*rows[row][:3]))
        given = x.clone()
        for row, one in zip(apart, made, strict=True):
            given[row] = one[0]
        return Shown(x, mask_BT.to(x.device), given, None)

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


def frame_masks(kinds: list[str], num_frames: int, draws: list[float]) -> Tensor:
    """Mask (B, T) of the latent frames that each kind gives."""
    pairs = zip(kinds, draws, strict=True)
    return torch.stack([frame_mask(kind, num_frames, u) for kind, u in pairs])


@dataclass(frozen=True)
class Draws:
    """What chance decides about the clips of a batch, keyed by (epoch, row): the kind of conditioning and the
    latent frames it gives, (B, T), the noise level of the clip and of its given frames, (B,), and the prompt that
    the model is told ('' where the caption was dropped)."""

    keys: list[tuple[int, int]]
    kinds: list[str]
    mask_BT: Tensor
    t_B: Tensor
    t_cond_B: Tensor
    prompts: list[str]


@dataclass(frozen=True)
class Shown:
    """Clean latents (B, C, T, H, W) of clips and what is given of them: see FlowBatch."""

    x: Tensor
    mask_BT: Tensor
    given: Tensor | None
    condition: Tensor | None


@dataclass(frozen=True)
class FlowBatch:
    """Latents on their way from data to noise: everything the velocity loss needs.

    x and noise are (B, C, T, H, W); t_B is each clip's noise level; mask_BT is 1 for latent frames
    that are given.
    """

    x: Tensor
    noise: Tensor
    t_B: Tensor
    mask_BT: Tensor
    prompts: list[str]
    fps_B: Tensor
    text: tuple[Tensor | None, ...] = ()
    """Caption embeddings (L, E) that are known already, for the prompts that have one; empty: for none."""
    given: Tensor | None = None
    """Latents (B, C, T, H, W) as they are given, where that is not x itself: see `diffusion.given`."""
    condition: Tensor | None = None
    """With cond_mode=concat: mask channels and given latents (B, factor + C, T, H, W), which stand beside the noisy
    latents. Every frame is then noisy and counts."""
    t_cond_B: Tensor | None = None
    """Noise level of each clip's given frames; None: 0."""
    time_weight_B: Tensor | None = None
    """Factor on each clip's loss; None: 1."""
    spread: Spread = ALONE
    """Who encodes the captions."""
    kinds: list[str] = field(default_factory=list)
    """The kind of conditioning of each clip, where it is told."""

    def predict(self, model: nn.Module) -> Tensor:
        """The model's velocity (B, C, T, H, W)."""
        assert isinstance(model, TextToVideo)
        text = model.embed(self.prompts, self.text or [None] * len(self.prompts), self.spread)
        if self.condition is not None:
            t_BT = self.t_B[:, None].expand_as(self.mask_BT)
            z = torch.cat([interpolate(self.x, self.noise, t_BT), self.condition], dim=1)
            return model(z, t_BT, text, fps_B=self.fps_B)
        t_BT = frame_times(self.t_B, self.mask_BT, 0.0 if self.t_cond_B is None else self.t_cond_B)
        clean = self.x
        if self.given is not None:
            clean = torch.where(self.mask_BT[:, None, :, None, None] > 0, self.given, clean)
        z = interpolate(clean, self.noise, t_BT)
        mask_BT = self.mask_BT if model.transformer.mask_proj is not None else None
        return model(z, t_BT, text, mask_BT=mask_BT, fps_B=self.fps_B)

    @property
    def counted_BT(self) -> Tensor:
        """1 for the latent frames that the loss is about."""
        return 1.0 - self.mask_BT if self.condition is None else torch.ones_like(self.mask_BT)

    def loss_sum(self, model: nn.Module) -> Tensor:
        """Sum over the samples of each one's mean squared velocity error on the frames that count."""
        return self.losses(model).sum()

    def losses(self, model: nn.Module) -> Tensor:
        """Each sample's mean squared velocity error on the frames that count, (B,)."""
        v = self.predict(model)
        return velocity_losses(
            v, self.x, self.noise, self.counted_BT, time_weight_B=self.time_weight_B
        )[0]

    def frame_losses(self, model: nn.Module) -> Tensor:
        """The mean squared velocity error of each latent frame that counts, else 0, (B, T)."""
        v = self.predict(model)
        return frame_losses(v, self.x, self.noise, self.counted_BT, self.time_weight_B)

    def token_loss(self, model: nn.Module, tokens_per_frame: int) -> tuple[Tensor, Tensor]:
        """Sum over the video tokens that count of each one's mean squared velocity error, and how
        many these are."""
        v = self.predict(model)
        return token_loss(
            v, self.x, self.noise, self.counted_BT, tokens_per_frame, self.time_weight_B
        )


class VaeObjective(Objective):
    """Reconstruction of pixels: errors of pixels and of their differences, of features (LPIPS) and of what a
    discriminator says, and a KL divergence."""

    def __init__(self, cfg: Config, device: torch.device):
        """Raises UserError or ConfigError where a term that is asked for cannot be had."""
        self.seed = cfg.seed
        self.cfg: VaeObjectiveConfig = cfg.vae_objective
        self.device = device
        self.lpips = Lpips.load(self.cfg.lpips_path).to(device) if self.cfg.lpips else None
        self.lpips_digest = self.lpips.digest() if self.lpips else ""
        self.adversary: Adversary | None = None
        if self.cfg.adversarial:
            cfg.vae_objective.require_start_before(cfg.train.steps)
            self.adversary = Adversary(cfg, device)

    def weights(self, batch: ClipBatch) -> dict[str, float]:
        names = [name for name in ("mse", "l1", "kl", "gradient", "lpips") if self.factor(name)]
        if self.adversary and self.adversary.acts:
            names.append("adversarial")
        return dict.fromkeys(names, batch.weight)

    def factor(self, name: str) -> float:
        """The weight of a term in the loss."""
        return float(getattr(self.cfg, name))

    def terms(self, model: nn.Module, batch: ClipBatch) -> dict[str, Term]:
        clips = batch.clips or placeholder(batch)
        pixels = to_pixels(clips, self.device)
        keys = [(clip.epoch, clip.row) for clip in clips]
        reconstruction, mean, logvar = model(
            pixels, lambda shape: draw_noise(self.seed, "posterior", keys, shape)
        )
        adaptive = self.cfg.adversarial_adaptive and self.adversary and self.adversary.acts
        if adaptive:
            # Gradients are taken here on the way: of a tensor of its own, since the engine's hooks wait at the model's.
            reconstruction = reconstruction.clone()
        errors: dict[str, Tensor] = {
            "mse": per_sample(reconstruction.sub(pixels).square()),
            "l1": per_sample(reconstruction.sub(pixels).abs()),
            "gradient": difference_error(reconstruction, pixels),
            # KL(N(mean, exp(logvar)) || N(0, 1)) per latent value (Kingma & Welling 2014, arXiv:1312.6114, app. B).
            "kl": per_sample(0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)),
        }
        if self.lpips:
            errors["lpips"] = self.lpips.clips(reconstruction, pixels)
        good = float(batch.weight > 0)
        if self.adversary:
            if not good:
                errors["adversarial"] = reconstruction.new_zeros(len(clips))
            elif self.adversary.trains:
                self.adversary.learn(pixels, reconstruction)
            if good and self.adversary.acts:
                seen = ("mse", "l1", "gradient", "lpips")
                parts = [self.factor(name) * errors[name] for name in seen if self.factor(name)]
                likeness = torch.stack(parts).sum(dim=0) if adaptive else None
                errors["adversarial"] = self.adversary.error(reconstruction, likeness)
        return {
            name: Term(
                self.factor(name) * good * errors[name].sum(),
                batch.weight,
                self.factor(name) * errors[name].detach(),
            )
            for name in self.weights(batch)
        }

    def step(self) -> dict[str, float]:
        return self.adversary.step() if self.adversary else {}

    def skip(self) -> None:
        if self.adversary:
            self.adversary.skip()

    def tensors(self) -> dict[str, Tensor]:
        return self.adversary.tensors() if self.adversary else {}

    def facts(self) -> dict[str, Any]:
        return {"lpips_digest": self.lpips_digest} if self.lpips else {}


def per_sample(error: Tensor) -> Tensor:
    return error.flatten(1).mean(dim=1)


def difference_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbours in time, height and width, (B,)."""
    axes = [axis for axis in (2, 3, 4) if a.shape[axis] > 1]
    errors = [per_sample((a.diff(dim=axis) - b.diff(dim=axis)).abs()) for axis in axes]
    return torch.stack(errors).sum(dim=0)
