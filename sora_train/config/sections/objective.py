"""What is learned: the loss of the diffusion transformer and that of the video autoencoder."""

from typing import Literal

from pydantic import Field, model_validator

from sora_train.config.sections.base import Section
from sora_train.config.sections.data import FloatList
from sora_train.errors import ConfigError


class LossConfig(Section):
    reduce: Literal["per_sample", "per_token"] = "per_sample"
    """How losses of a step are averaged: over clips (`per_sample`), or over the video tokens trained on (`per_token`),
    so that a long clip weighs more than an image."""


class ConditioningConfig(Section):
    i2v: float = Field(0.0, ge=0, le=1)
    """Share of clips trained with the first latent frame given (image to video)."""
    i2v_last: float = Field(0.0, ge=0, le=1)
    """Share trained with the last frame given, as a single image."""
    i2v_both: float = Field(0.0, ge=0, le=1)
    """Share trained with the first and the last frame given, as single images."""
    extend: float = Field(0.0, ge=0, le=1)
    """Share trained with the first k latent frames given, k drawn at random (extension forwards)."""
    extend_back: float = Field(0.0, ge=0, le=1)
    """Share trained with the last k latent frames given, k drawn at random (extension backwards)."""
    infill: float = Field(0.0, ge=0, le=1)
    """Share trained with all latent frames given except for a gap of random length between the ends."""
    connect: float = Field(0.0, ge=0, le=1)
    """Share trained with the first k and the last k latent frames given (two clips joined)."""
    loop: float = Field(0.0, ge=0, le=1)
    """Share trained as loops: the clip plays to its middle and back. Its first frame, which is also the last one, is
    given at both ends."""
    every_nth: float = Field(0.0, ge=0, le=1)
    """Share trained with every n-th latent frame given, n >= 2 drawn at random (interpolation)."""
    random: float = Field(0.0, ge=0, le=1)
    """Share trained with a random subset of the latent frames given, from one frame to all but one."""


class ObjectiveConfig(Section):
    time_law: Literal["uniform", "logit_normal", "mode"] = "logit_normal"
    """Distribution of the noise level t in training; 0 is data, 1 is noise."""
    time_mean: float = 0.0
    """Mean of logit(t) for `logit_normal`; a larger mean gives noisier samples."""
    time_std: float = Field(1.0, gt=0)
    """Standard deviation of logit(t) for `logit_normal`."""
    high_noise_share: float = Field(0.0, ge=0, le=1)
    """Share of clips whose noise level, after the shift, is drawn uniformly from [`objective.high_noise_from`, 1]
    instead: the nearly pure noise that sampling starts from (Cosmos-Predict2.5 takes 0.05)."""
    high_noise_from: float = Field(0.98, ge=0, lt=1)
    """Lowest noise level of the clips of `objective.high_noise_share`."""
    mode_scale: float = 1.29
    """Parameter s of the `mode` law (Esser et al. 2024, arXiv:2403.03206, eq. 20)."""
    shift: float = Field(1.0, gt=0)
    """Time shift: t' = shift * t / (1 + (shift - 1) * t), in training and in sampling."""
    shift_rule: Literal["constant", "resolution", "frame", "length", "root"] = "constant"
    """`constant`: every clip takes `objective.shift`. The others multiply it by a factor that grows with the tokens
    of a frame (`frame`), with the clip's length (`length`), or with both (`resolution`: Open-Sora 2.0's rule; `root`:
    Open-Sora 1.2's)."""
    weighting: Literal["uniform", "cosmap", "min_snr"] = "uniform"
    """Factor on the loss by noise level: none, `cosmap` (arXiv:2403.03206) or `min_snr` (arXiv:2303.09556)."""
    min_snr_gamma: float = Field(5.0, gt=0)
    """Signal-to-noise ratio at which the weight of `min_snr` stops growing."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Share of clips trained with the empty caption, which classifier-free guidance needs."""
    conditioning: ConditioningConfig = ConditioningConfig()
    """Share of clips by the frames that are given to the model; the other clips get the caption alone (t2v)."""
    cond_mode: Literal["replace", "concat"] = "replace"
    """How given frames reach the model: `replace` puts them into the noisy latents and takes them out of the loss;
    `concat` adds them and their mask as input channels (Wan 2.1's image-to-video layout)."""
    condition_noise_share: float = Field(0.0, ge=0, le=1)
    """Share of clips whose given frames get a little noise, since generated frames have some too; needs
    cond_mode=replace."""
    condition_noise_max: float = Field(0.1, ge=0, le=1)
    """Largest noise level of such frames; levels are drawn uniformly from 0 to this."""
    condition_dropout: float = Field(0.0, ge=0, le=1)
    """Share of clips that lose their given frames, drawn independently of `objective.caption_dropout`."""
    frame_noise_share: float = Field(0.0, ge=0, le=1)
    """Share of clips of which each latent frame is trained at a noise level of its own (diffusion forcing,
    arXiv:2407.01392): such a model continues from frames of any noise."""
    history_frames: int = Field(13, ge=1)
    """Frames of a long video (`sora sample --seconds`) that each next window is shown, stored in the diffusion spec;
    fewer where a window leaves no room. LongCat-Video takes 13 of 93."""
    history_noise: float = Field(0.02, ge=0, le=1)
    """Noise level at which a window is shown them, stored in the diffusion spec: it hides what generated frames lack.
    Train with `objective.condition_noise_share`."""
    history_shift: float = Field(0.0, ge=0)
    """Time shift with which such a window is sampled, stored in the diffusion spec; 0: `objective.shift`."""
    num_steps: int = Field(50, ge=1)
    """Sampler steps stored in the diffusion spec."""
    guidance_scale: float = Field(4.0, ge=1)
    """Classifier-free guidance stored in the diffusion spec; 1 switches it off."""
    guidance_scale_2: float = Field(0.0, ge=0)
    """Guidance below `model.boundary`, for a model of two experts; 0: `objective.guidance_scale` there too."""
    condition_scale: float = Field(1.0, ge=0)
    """Guidance by given frames stored in the diffusion spec; 1 switches it off. It costs a further call of the model in
    each step."""
    guidance_from: float = Field(0.0, ge=0, le=1)
    """Lowest noise level at which samples are guided, stored in the diffusion spec."""
    guidance_to: float = Field(1.0, ge=0, le=1)
    """Highest noise level at which samples are guided (arXiv:2404.07724)."""
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """How far guided predictions are rescaled to the spread of unguided ones (arXiv:2305.08891): 0 not at all, 1 fully;
    stored in the diffusion spec."""
    time_grid: Literal["even", "unipc", "flow_match_euler"] = "even"
    """Times of the sampler's steps: evenly spaced and then shifted (`even`), or those of a scheduler of diffusers."""
    time_rounding: Literal["none", "truncate"] = "none"
    """`truncate`: the model gets noise levels cut off to whole thousandths, as in diffusers' UniPC."""
    solver: Literal["euler", "heun", "unipc"] = "euler"
    """ODE solver stored in the diffusion spec."""

    @model_validator(mode="after")
    def _kinds_add_up(self) -> "ObjectiveConfig":
        shares = self.conditioning.model_dump()
        if sum(shares.values()) > 1 + 1e-6:
            raise ValueError(
                f"objective.conditioning adds up to {sum(shares.values()):g}; its shares are of all clips, so make "
                "them at most 1 in sum"
            )
        if self.cond_mode == "concat" and self.condition_noise_share:
            raise ValueError(
                "objective.condition_noise_share is for cond_mode=replace; with concat given frames have no noise "
                "level of their own, so set it to 0"
            )
        return self

    @property
    def mix(self) -> tuple[tuple[str, float], ...]:
        """(kind, probability) of every kind that is trained and of t2v; probabilities sum to 1."""
        shares = self.conditioning.model_dump()
        rest = max(0.0, 1.0 - sum(shares.values()))
        return (("t2v", rest), *((kind, share) for kind, share in shares.items() if share > 0))

    @property
    def needs_pixels(self) -> bool:
        """Whether given frames are encoded from pixels of their own, which stored latents lack."""
        return self.cond_mode == "concat" or any(
            kind not in ("t2v", "i2v", "extend") for kind, _ in self.mix
        )


class DistillConfig(Section):
    teacher: str = ""
    """A run folder, or FOLDER@STEP, whose averaged weights with their guidance are distilled into this run, so that a
    few steps without guidance do; `sora distill` sets it, see docs/few_steps.md. Empty: nothing is distilled."""
    guidance_scale: float = Field(4.0, ge=1)
    """Classifier-free guidance of the teacher, which ends up in the weights; `sora distill` takes that of its run."""
    levels: int = Field(8, ge=1)
    """Noise levels that are trained: those of a sampler of so many steps. A multiple of `objective.num_steps` holds all
    that samples are made at."""


class VaeObjectiveConfig(Section):
    mse: float = Field(1.0, ge=0)
    """Weight of the mean squared pixel error. With an absolute error alone, whose best guess is the median, small
    saturated objects are missing for thousands of steps."""
    l1: float = Field(0.1, ge=0)
    """Weight of the mean absolute pixel error, which sharpens small errors."""
    kl: float = Field(1e-5, ge=0)
    """Weight of the KL divergence from a unit Gaussian."""
    gradient: float = Field(0.1, ge=0)
    """Weight of the absolute error of spatial and temporal differences, for sharp edges without a learned loss."""
    lpips: float = Field(0.0, ge=0)
    """Weight of LPIPS, the distance of VGG16's features, averaged over frames (arXiv:1801.03924); HunyuanVideo took
    0.1."""
    lpips_path: str = ""
    """Weights of LPIPS: torchvision's VGG16 and the published linear layers, in one .safetensors or .pth file or in a
    folder with both."""
    adversarial: float = Field(0.0, ge=0)
    """Weight of the adversarial loss of a discriminator (hinge loss, a PatchGAN over space and time); HunyuanVideo took
    0.05."""
    adversarial_from: int = Field(0, ge=0)
    """Step from which the adversarial loss trains the autoencoder, which should reconstruct well by then."""
    adversarial_warmup: int = Field(0, ge=0)
    """Steps before `vae_objective.adversarial_from` in which the discriminator alone is trained."""
    adversarial_adaptive: bool = True
    """Scale each clip's adversarial loss so that its gradient at the pixels is as long as that of the other terms
    (VQGAN, arXiv:2012.09841, eq. 7); `vae_objective.adversarial` is then a share of it."""
    disc_lr: float = Field(1e-4, gt=0)
    """Learning rate of the discriminator, constant; its optimizer is `optim.name`, without weight decay."""
    disc_betas: FloatList = (0.5, 0.9)
    """AdamW's decay of first and second moments, for the discriminator."""
    disc_channels: int = Field(64, ge=8, multiple_of=8)
    """Channels of the discriminator's first layer. Each further layer has twice as many, up to eight times."""
    disc_layers: int = Field(3, ge=1)
    """How often the discriminator halves height and width; more layers judge larger patches."""

    @model_validator(mode="after")
    def _terms_are_whole(self) -> "VaeObjectiveConfig":
        if self.lpips and not self.lpips_path:
            raise ValueError(
                f"vae_objective.lpips={self.lpips:g} needs vae_objective.lpips_path, which is empty; name the file of "
                "VGG16 and the linear layers, or set vae_objective.lpips=0"
            )
        if self.adversarial_warmup > self.adversarial_from:
            raise ValueError(
                f"vae_objective.adversarial_warmup={self.adversarial_warmup} begins before step 0: it ends at "
                f"vae_objective.adversarial_from={self.adversarial_from}, so make it that at most"
            )
        if self.adversarial_adaptive and self.adversarial and not self._seen:
            raise ValueError(
                "vae_objective.adversarial_adaptive=true weighs the adversarial term against mse, l1, gradient and "
                "lpips, which are all 0; set it to false, or give one of them a weight"
            )
        return self

    @property
    def _seen(self) -> float:
        return self.mse + self.l1 + self.gradient + self.lpips

    def require_start_before(self, steps: int) -> None:
        """Raises ConfigError where the adversarial term would begin after the run has ended."""
        if self.adversarial and self.adversarial_from >= steps:
            raise ConfigError(
                f"vae_objective.adversarial_from={self.adversarial_from} is not reached in train.steps={steps}; begin "
                "earlier, train longer, or set vae_objective.adversarial=0"
            )
