"""How a run proceeds: steps, optimizer, weights' average, checkpoints, validation, samples, tracking."""

from typing import Literal

from pydantic import Field, model_validator

from sora_train.config.base import Section
from sora_train.config.data import FloatList, StrList


class RunConfig(Section):
    dir: str = "runs/default"
    """The run folder. The same folder again means: go on from its newest checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""
    deterministic: bool | Literal["auto"] = "auto"
    """Bit-for-bit repeatable kernels; `auto`: on for CPU, off for GPU."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch in each rank; 0: the cores of the machine shared among its ranks."""


class InitConfig(Section):
    run: str = ""
    """A run folder, or FOLDER@STEP, whose weights this run starts from while it has no checkpoint of its own: the
    stage before, or what `sora ckpt import` has made."""
    weights: Literal["ema", "live"] = "ema"
    """Its averaged weights, or those as trained."""


class TrainConfig(Section):
    steps: int = Field(1000, ge=0)
    """Optimizer steps of the whole run; 0: as many as `train.epochs` take."""
    epochs: float = Field(0.0, ge=0)
    """Passes over the clips instead of `train.steps`, rounded up to whole steps; needs train.steps=0."""
    micro_batches: int = Field(1, ge=1)
    """Micro-batches of one step over all ranks (M): fixed by the config, so a run means the same at any world size."""
    log_every: int = Field(1, ge=1)
    """Steps between two rows of metrics.jsonl."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if self.steps and self.epochs:
            raise ValueError(
                f"train.steps={self.steps} and train.epochs={self.epochs:g} both say how long to train; "
                "set train.steps=0 to train for epochs, or leave train.epochs out"
            )
        if not self.steps and not self.epochs:
            raise ValueError(
                "train.steps=0 and train.epochs=0 train nothing; set one of them, for example train.steps=1000"
            )
        return self


class LossConfig(Section):
    reduce: Literal["per_sample", "per_token"] = "per_sample"
    """What counts alike in the mean over a step: every clip, or every video token trained on, so that a long clip
    weighs more than an image."""


class ElasticConfig(Section):
    min_efficiency: float = Field(0.5, ge=0, le=1)
    """Least share of a step's slots that must hold a micro-batch: where the ranks do not divide
    `train.micro_batches` the slots left over idle, and below this share the run refuses to start."""


class OptimConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    """`sgd` (no momentum) is for parity tests: AdamW hides a wrong gradient scale."""
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    text_lr_scale: float = Field(1.0, gt=0)
    """Factor on the learning rate of a trainable text encoder."""
    betas: FloatList = (0.9, 0.99)
    """AdamW's decay of first and second moments."""
    eps: float = Field(1e-10, gt=0)
    """AdamW's epsilon; small, since QK-norm and zero-initialised layers make gradients small."""
    weight_decay: float = Field(0.0, ge=0)
    """Applied to matrices only, never to norms, biases and modulation tables."""
    warmup_steps: int = Field(100, ge=0)
    """Steps over which the learning rate rises linearly from zero."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the learning rate after warm-up, down to `optim.final_lr_fraction` by the end of the run."""
    final_lr_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the peak that the learning rate falls to by the end of the run."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; larger gradients are scaled down to it. 0 switches clipping off."""


class EmaConfig(Section):
    decay: float = Field(0.999, ge=0, lt=1)
    """Decay of the weights' average a step; the start is ramped as min(decay, (1 + step) / (10 + step))."""


class ParallelConfig(Section):
    dp_replicate: int = Field(1, ge=1)
    """Replicas of the sharded model (HSDP)."""
    dp_shard: int = -1
    """Ranks each weight is split over; -1: what the other degrees leave."""
    param_dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Precision in which weights reach compute; `auto`: bfloat16 on GPU, float32 on CPU. Masters are always float32."""


class CheckpointConfig(Section):
    every: int = Field(500, ge=0)
    """Steps between checkpoints; 0: only the last step."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: go on from the newest complete checkpoint of the run folder."""


class ValidationConfig(Section):
    every: int = Field(500, ge=0)
    """Steps between validations; 0: never."""
    times: FloatList = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Noise levels t at which the loss of every held-out clip is measured, with fixed noise."""
    max_clips: int = Field(64, ge=1)
    """Held-out clips used."""
    kinds: StrList = ()
    """Kinds of conditioning validated, t2v and others; empty: all that `objective.conditioning` trains."""
    live: bool = True
    """Also measure the weights as they are, beside their average (`val/live/loss`)."""

    @model_validator(mode="after")
    def _times_inside(self) -> "ValidationConfig":
        bad = [t for t in self.times if not 0 < t < 1]
        if bad or not self.times:
            raise ValueError(
                f"validation.times must be numbers between 0 and 1, got {list(self.times)}"
            )
        return self


class SampleConfig(Section):
    every: int = Field(500, ge=0)
    """Steps between sample clips; 0: never."""
    prompts: StrList = ()
    """What is sampled; empty: captions of the first held-out clips."""
    max_prompts: int = Field(8, ge=1)
    """Prompts sampled during training."""
    seed: int = 0
    """Seed of the samples' noise."""
    oracle_prompts: int = Field(0, ge=0)
    """Prompts on which the shapes oracle scores the final weights (seen and held-out each); 0: no scoring."""


class TrackerConfig(Section):
    kind: Literal["none", "wandb"] = "none"
    """Where metrics.jsonl is copied to."""
    project: str = "sora_train"
    """W&B project."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """`auto`: online when a W&B key is configured, else offline in the run folder."""


class ConditioningConfig(Section):
    i2v: float = Field(0.0, ge=0, le=1)
    """Share of clips trained with their first latent frame given (image to video)."""
    i2v_last: float = Field(0.0, ge=0, le=1)
    """Share trained with their last frame given, as a single image."""
    i2v_both: float = Field(0.0, ge=0, le=1)
    """Share trained with their first and last frame given, as single images."""
    extend: float = Field(0.0, ge=0, le=1)
    """Share trained with their first k latent frames given, k drawn (extension forwards)."""
    extend_back: float = Field(0.0, ge=0, le=1)
    """Share trained with their last k latent frames given (extension backwards)."""
    infill: float = Field(0.0, ge=0, le=1)
    """Share trained with all latent frames given but a gap of any length between the ends."""
    connect: float = Field(0.0, ge=0, le=1)
    """Share trained with the first k and the last k latent frames given (two clips joined)."""
    loop: float = Field(0.0, ge=0, le=1)
    """Share trained as loops: the clip plays to its middle and back, and its first frame, which is its last too, is
    given at both ends."""
    every_nth: float = Field(0.0, ge=0, le=1)
    """Share trained with every n-th latent frame given, n >= 2 drawn (interpolation)."""
    random: float = Field(0.0, ge=0, le=1)
    """Share trained with any of their latent frames given, one to all but one."""


class ObjectiveConfig(Section):
    time_law: Literal["uniform", "logit_normal", "mode"] = "logit_normal"
    """Distribution of the noise level t in training."""
    time_mean: float = 0.0
    """Mean of logit(t) under `logit_normal`; positive means noisier."""
    time_std: float = Field(1.0, gt=0)
    """Standard deviation of logit(t)."""
    high_noise_share: float = Field(0.0, ge=0, le=1)
    """Share of clips trained at a noise level uniform in [`objective.high_noise_from`, 1] instead, after the shift:
    the nearly pure noise that sampling starts from (Cosmos-Predict2.5 takes 0.05)."""
    high_noise_from: float = Field(0.98, ge=0, lt=1)
    """Where high noise begins."""
    mode_scale: float = 1.29
    """Parameter s of the `mode` law (Esser et al. 2024, arXiv:2403.03206, eq. 20)."""
    shift: float = Field(1.0, gt=0)
    """Time shift: t' = shift * t / (1 + (shift - 1) * t), in training and sampling alike."""
    shift_rule: Literal["constant", "resolution", "frame", "length", "root"] = "constant"
    """`constant`: `objective.shift` for every clip. Others: times a factor that grows with tokens a frame (`frame`),
    with length (`length`), or with both (`resolution`, Open-Sora 2.0's; `root`, Open-Sora 1.2's)."""
    weighting: Literal["uniform", "cosmap", "min_snr"] = "uniform"
    """Factor on the loss by noise level: none, `cosmap` (arXiv:2403.03206) or `min_snr` (arXiv:2303.09556)."""
    min_snr_gamma: float = Field(5.0, gt=0)
    """Signal-to-noise ratio above which `min_snr` stops weighing more."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Share of samples trained with the empty caption, so that guidance has a null."""
    i2v_fraction: float = Field(0.0, ge=0, le=1)
    """The same as `objective.conditioning.i2v`, which see; only one of them may be set."""
    conditioning: ConditioningConfig = ConditioningConfig()
    """Share of clips by what they are given besides their caption; the others get the caption alone (t2v)."""
    cond_mode: Literal["replace", "concat"] = "replace"
    """How given frames reach the model: `replace` puts them into the noisy latents and leaves them out of the loss;
    `concat` adds them and their mask as input channels (Wan 2.1's image-to-video layout)."""
    condition_noise_share: float = Field(0.0, ge=0, le=1)
    """Share of clips whose given frames carry a little noise, as generated ones do; with cond_mode=replace."""
    condition_noise_max: float = Field(0.1, ge=0, le=1)
    """Their noise levels are uniform from 0 to this."""
    condition_dropout: float = Field(0.0, ge=0, le=1)
    """Share of clips from which the given frames are withheld, drawn independently of `objective.caption_dropout`."""
    num_steps: int = Field(50, ge=1)
    """Sampler steps stored in the diffusion spec."""
    guidance_scale: float = Field(4.0, ge=1)
    """Classifier-free guidance stored in the diffusion spec; 1 switches it off."""
    condition_scale: float = Field(1.0, ge=0)
    """Guidance by given frames stored in the diffusion spec; 1 is none, and it costs another call of the model."""
    guidance_from: float = Field(0.0, ge=0, le=1)
    """Lowest noise level at which samples are guided, stored in the diffusion spec."""
    guidance_to: float = Field(1.0, ge=0, le=1)
    """Highest noise level at which samples are guided (arXiv:2404.07724)."""
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    """How much of the spread that guidance adds is taken back (arXiv:2305.08891), stored in the diffusion spec."""
    time_grid: Literal["even", "unipc", "flow_match_euler"] = "even"
    """Times of the sampler's steps: `even` ones, shifted, or those of one of diffusers' two schedulers."""
    time_rounding: Literal["none", "truncate"] = "none"
    """`truncate` tells the model noise levels cut off to whole thousandths, as diffusers' UniPC does."""
    solver: Literal["euler", "heun", "unipc"] = "euler"
    """ODE solver stored in the diffusion spec."""

    @model_validator(mode="after")
    def _kinds_add_up(self) -> "ObjectiveConfig":
        shares = self.conditioning.model_dump()
        if self.i2v_fraction and any(shares.values()):
            raise ValueError(
                f"objective.i2v_fraction={self.i2v_fraction:g} is given beside objective.conditioning; set "
                f"objective.conditioning.i2v={self.i2v_fraction:g} instead"
            )
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
        shares = self.conditioning.model_dump() | (
            {"i2v": self.i2v_fraction} if self.i2v_fraction else {}
        )
        rest = max(0.0, 1.0 - sum(shares.values()))
        return (("t2v", rest), *((kind, share) for kind, share in shares.items() if share > 0))

    @property
    def needs_pixels(self) -> bool:
        """Whether given frames are encoded from pixels of their own, which stored latents lack."""
        return self.cond_mode == "concat" or any(
            kind not in ("t2v", "i2v", "extend") for kind, _ in self.mix
        )


class VaeObjectiveConfig(Section):
    mse: float = Field(1.0, ge=0)
    """Weight of the mean squared pixel error. It teaches small saturated things first, which an absolute error, whose
    best guess is the median, leaves out for thousands of steps."""
    l1: float = Field(0.1, ge=0)
    """Weight of the mean absolute pixel error, which sharpens what is nearly right."""
    kl: float = Field(1e-5, ge=0)
    """Weight of the KL divergence from a unit Gaussian."""
    gradient: float = Field(0.1, ge=0)
    """Weight of the absolute error of spatial and temporal differences: sharp edges without a learned loss."""
