"""How a run proceeds: steps, optimizer, weights' average, checkpoints, validation, samples, tracking."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sora_train.config.sections.base import Section
from sora_train.config.sections.data import FloatList, StrList
from sora_train.errors import ConfigError


class RunConfig(Section):
    dir: str = "runs/default"
    """The run folder. The same folder again means: go on from its newest checkpoint."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""
    deterministic: bool | Literal["auto"] = "auto"
    """Bit-for-bit repeatable kernels; `auto`: on for CPU, off for GPU."""
    memory_history: bool = False
    """Record what the GPU's allocator does, and write its snapshot beside the report of a run out of memory."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch in each rank; 0: the cores of the machine shared among its ranks."""
    peak_tflops: float = Field(0.0, ge=0)
    """What one device could do at best, in TFLOP/s, of which `train/mfu` is the share; 0: by the GPU's name, and on a
    CPU or an unknown GPU there is no MFU."""


class InitConfig(Section):
    run: str = ""
    """A run folder, or FOLDER@STEP, whose weights this run starts from while it has no checkpoint of its own: the
    stage before, or what `sora ckpt import` has made."""
    weights: Literal["ema", "live"] = "ema"
    """Its averaged weights, or those as trained."""
    optimizer: bool = False
    """Take over its optimizer's moments and step count too; the learning rate's schedule begins anew."""


class ResumeConfig(Section):
    run: str = ""
    """A run folder, or FOLDER@STEP, that this run is forked from while it has no checkpoint of its own: weights,
    optimizer, average, place in the data, and the metrics up to there."""
    allow_missing: StrList = ()
    """Patterns of tensors (`ema.*`) that a checkpoint may lack; they begin as at step 0, an average as the
    weights."""
    probe: bool = True
    """Keep the loss of a small fixed batch in each checkpoint, and stop where it is another after loading."""
    probe_tolerance: float = Field(0.01, ge=0)
    """Relative difference of that loss that is let pass where layout, device or libraries changed; where nothing did
    and kernels are deterministic it must be equal to the last bit."""


class StageConfig(Section):
    name: str
    """Name of the stage, and of its folder."""
    overrides: StrList = ()
    """What this stage sets, as on the command line: `train.steps=1000`, `buckets=high`."""
    weights: Literal["ema", "live"] = "ema"
    """Which weights of the stage before it begins with."""
    optimizer: bool = False
    """Whether it takes over the optimizer's moments of the stage before."""

    @field_validator("name")
    @classmethod
    def _a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError(
                f"stages name {name!r} is no folder's name; use letters, digits, - and _"
            )
        return name


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
    more: FloatList = ()
    """Decays of further averages kept beside, each as large as the weights: [0.99, 0.9999] are `ema_99` and
    `ema_9999` in checkpoints, and `sora sample --ema 0.99` samples from one."""
    post_hoc: FloatList = ()
    """Widths sigma_rel of power-function averages kept beside, usually [0.05, 0.10]: of their snapshots `sora ckpt
    average RUN --sigma-rel 0.12` makes the average of any other width when training is over (arXiv:2312.02696)."""
    snapshot_every: int = Field(0, ge=0)
    """Steps between snapshots of the `ema.post_hoc` averages; 0: as often as checkpoints. All of them are kept."""
    snapshot_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision of the snapshots."""

    @model_validator(mode="after")
    def _averages_are_told_apart(self) -> "EmaConfig":
        bad = [value for value in self.more if not 0 <= value < 1]
        if bad:
            raise ValueError(
                f"ema.more holds {bad[0]:g}; a decay is from 0 to below 1, such as 0.9999"
            )
        bad = [value for value in self.post_hoc if not 0.001 <= value <= 0.288]
        if bad:
            raise ValueError(
                f"ema.post_hoc holds {bad[0]:g}; a sigma_rel is from 0.001 to 0.288, such as 0.05"
            )
        for key, values in (("more", self.more), ("post_hoc", self.post_hoc)):
            if len(set(values)) < len(values):
                raise ValueError(f"ema.{key}={list(values)} holds a value twice; give each once")
        if self.decay in self.more:
            raise ValueError(
                f"ema.more holds {self.decay:g}, which is ema.decay and kept already; leave it out"
            )
        return self


class CheckpointConfig(Section):
    every: int = Field(500, ge=0)
    """Steps between checkpoints; 0: only the last step."""
    mode: Literal["async", "sync"] = "async"
    """`async`: a save copies the state into host memory of its own, as large as this rank's part of a checkpoint, and
    is written behind the training; `sync`: the training waits for it."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of steps that this divides are kept for ever; 0: none."""
    keep_best: int = Field(0, ge=0)
    """How many checkpoints are kept besides, of those whose step was validated with the lowest `val/loss`."""
    rehearse: bool = True
    """Before step 1 write a checkpoint, commit it, read it back and remove it, so that what would fail fails then."""
    remote: str = ""
    """Folder in an object store (`s3://bucket/run`) to which checkpoints are uploaded behind the local ones, and from
    which a newer one than those in the run folder is fetched."""
    remote_seconds: float = Field(600.0, gt=0)
    """How long an upload or download is tried again, before the run stops with what went wrong."""
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


TrackerKinds = Annotated[
    tuple[Literal["wandb", "tensorboard"], ...], Field(strict=False, min_length=1)
]


class TrackerConfig(Section):
    kind: Literal["none", "wandb", "tensorboard"] | TrackerKinds = "none"
    """Where metrics.jsonl and samples are copied to, by a process each; a list names several."""
    project: str = "sora_train"
    """W&B project."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """`auto`: online when a W&B key is configured, else offline in the run folder."""
    finish_seconds: float = Field(30.0, gt=0)
    """How long the end of a run waits for its trackers; one that takes longer is ended, and the run is not affected."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The trackers, each once."""
        if isinstance(self.kind, str):
            return () if self.kind == "none" else (self.kind,)
        return tuple(dict.fromkeys(self.kind))


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
    lpips: float = Field(0.0, ge=0)
    """Weight of LPIPS, the distance of VGG16's features, averaged over frames (arXiv:1801.03924); HunyuanVideo took
    0.1."""
    lpips_path: str = ""
    """Its weights: torchvision's VGG16 and the published linear layers, one .safetensors or .pth file, or a folder
    with both."""
    adversarial: float = Field(0.0, ge=0)
    """Weight of what a discriminator says of the reconstruction (hinge loss, a PatchGAN over space and time);
    HunyuanVideo took 0.05."""
    adversarial_from: int = Field(0, ge=0)
    """Step from which the discriminator acts on the autoencoder, which should reconstruct well by then."""
    adversarial_warmup: int = Field(0, ge=0)
    """Steps before that in which the discriminator learns alone."""
    adversarial_adaptive: bool = True
    """Multiply each clip's adversarial loss by the length of the other pixel terms' gradient over that of its own, as
    VQGAN does (arXiv:2012.09841, eq. 7), at the pixels; `vae_objective.adversarial` is then a share."""
    disc_lr: float = Field(1e-4, gt=0)
    """Learning rate of the discriminator, constant; its optimizer is `optim.name`, without weight decay."""
    disc_betas: FloatList = (0.5, 0.9)
    """AdamW's decay of first and second moments, for the discriminator."""
    disc_channels: int = Field(64, ge=8, multiple_of=8)
    """Channels of the discriminator's first layer; each further one has twice as many, up to eight times."""
    disc_layers: int = Field(3, ge=1)
    """Times the discriminator halves height and width: more layers judge larger patches."""

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
