"""Every key of a run: frozen pydantic models, a file for each section, which check the values that Hydra picks."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sora_train.config.sections.adapter import AdapterConfig
from sora_train.config.sections.base import Section
from sora_train.config.sections.data import (
    BucketClass,
    BucketsConfig,
    DataConfig,
    MixConfig,
    SourceConfig,
)
from sora_train.config.sections.health import HealthConfig, SpikeDetectionConfig
from sora_train.config.sections.launch import LaunchConfig, SweepConfig
from sora_train.config.sections.memory import MemoryConfig
from sora_train.config.sections.model import ImageConfig, ModelConfig, TextConfig, VaeConfig
from sora_train.config.sections.objective import (
    ConditioningConfig,
    DistillConfig,
    LossConfig,
    ObjectiveConfig,
    VaeObjectiveConfig,
)
from sora_train.config.sections.optim import EmaConfig, OptimConfig
from sora_train.config.sections.outputs import (
    CheckpointConfig,
    SampleConfig,
    TrackerConfig,
    ValidationConfig,
)
from sora_train.config.sections.parallel import ParallelConfig
from sora_train.config.sections.run import (
    ElasticConfig,
    InitConfig,
    ResumeConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
)

__all__ = [
    "AdapterConfig",
    "BucketClass",
    "BucketsConfig",
    "CheckpointConfig",
    "ConditioningConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "ElasticConfig",
    "EmaConfig",
    "HealthConfig",
    "ImageConfig",
    "InitConfig",
    "LaunchConfig",
    "LossConfig",
    "SpikeDetectionConfig",
    "MemoryConfig",
    "MixConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParallelConfig",
    "ResumeConfig",
    "RunConfig",
    "SampleConfig",
    "Section",
    "SourceConfig",
    "StageConfig",
    "SweepConfig",
    "TextConfig",
    "TrackerConfig",
    "TrainConfig",
    "VaeConfig",
    "VaeObjectiveConfig",
    "ValidationConfig",
]


class Config(Section):
    """One run, whole. Subclass it to add sections of your own."""

    task: Literal["text_to_video", "vae"] = "text_to_video"
    """What is trained: the text-to-video model, or its video autoencoder."""
    name: str = "default"
    """Name of the experiment, shown in reports."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, data order, noise and every other draw; the same seed gives the same losses."""
    dry_run: bool = False
    """Print the card (sizes, clips per bucket, memory, time) and exit before step 1."""
    run: RunConfig = RunConfig()
    init: InitConfig = InitConfig()
    resume: ResumeConfig = ResumeConfig()
    stages: Annotated[tuple[StageConfig, ...], Field(strict=False)] = ()
    """Runs that follow each other in one folder; each begins with the weights of the one before."""
    data: DataConfig = DataConfig()
    buckets: BucketsConfig = BucketsConfig()
    model: ModelConfig = ModelConfig()
    vae: VaeConfig = VaeConfig()
    text: TextConfig = TextConfig()
    image: ImageConfig = ImageConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    distill: DistillConfig = DistillConfig()
    loss: LossConfig = LossConfig()
    spike_detection: SpikeDetectionConfig = SpikeDetectionConfig()
    vae_objective: VaeObjectiveConfig = VaeObjectiveConfig()
    adapter: AdapterConfig = AdapterConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()
    train: TrainConfig = TrainConfig()
    elastic: ElasticConfig = ElasticConfig()
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()
    launch: LaunchConfig = LaunchConfig()
    sweep: SweepConfig = SweepConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    sample: SampleConfig = SampleConfig()
    tracker: TrackerConfig = TrackerConfig()
    health: HealthConfig = HealthConfig()

    @model_validator(mode="after")
    def _reduction_fits_the_task(self) -> "Config":
        if self.task == "vae" and self.loss.reduce != "per_sample":
            raise ValueError(
                f"loss.reduce={self.loss.reduce} is for task=text_to_video; the autoencoder's loss counts every "
                "clip alike, so set loss.reduce=per_sample"
            )
        return self

    @model_validator(mode="after")
    def _vae_terms_fit_the_run(self) -> "Config":
        if self.task != "vae":
            for name in ("lpips", "adversarial"):
                if getattr(self.vae_objective, name):
                    raise ValueError(
                        f"vae_objective.{name}={getattr(self.vae_objective, name):g} is for task=vae, and this run's "
                        f"is {self.task}; set vae_objective.{name}=0 or task=vae"
                    )
        elif self.train.steps:
            self.vae_objective.require_start_before(self.train.steps)
        return self

    @model_validator(mode="after")
    def _what_is_distilled_fits(self) -> "Config":
        if not self.distill.teacher:
            return self
        asked, objective = f"distill.teacher={self.distill.teacher}", self.objective
        if self.task != "text_to_video":
            raise ValueError(
                f"{asked} is for task=text_to_video, and this run's is {self.task}; leave it out"
            )
        for key in ("guidance_scale", "condition_scale"):
            if getattr(objective, key) != 1:
                raise ValueError(
                    f"{asked} puts guidance into the weights, and objective.{key}={getattr(objective, key):g} would "
                    f"guide samples once more; set objective.{key}=1"
                )
        if objective.frame_noise_share:
            raise ValueError(
                f"{asked} follows clips of one noise level, and objective.frame_noise_share="
                f"{objective.frame_noise_share:g} draws one for each latent frame; set it to 0"
            )
        if self.model.expert:
            raise ValueError(
                f"{asked} is for one transformer, and model.expert={self.model.expert} is one of two; distill a model "
                "of one"
            )
        if self.adapter.on:
            raise ValueError(
                f"{asked} trains all weights, and adapter.rank={self.adapter.rank} an adapter alone; set "
                "adapter.rank=0"
            )
        return self

    @model_validator(mode="after")
    def _adapter_has_a_base(self) -> "Config":
        if not self.adapter.on:
            return self
        if self.task != "text_to_video":
            raise ValueError(
                f"adapter.rank={self.adapter.rank} is for task=text_to_video, and this run's is {self.task}; set "
                "adapter.rank=0"
            )
        if not self.init.run:
            raise ValueError(
                f"adapter.rank={self.adapter.rank} needs a base and init.run is empty; give the folder of a run, or of "
                "open weights that `sora ckpt import` has written"
            )
        if self.model.expert == "both":
            raise ValueError(
                f"adapter.rank={self.adapter.rank} is for one transformer, and model.expert=both has two; train an "
                "adapter for each, with model.expert=high and with low"
            )
        if self.init.optimizer:
            raise ValueError(
                "init.optimizer=true takes over the moments of all weights, and with adapter.rank="
                f"{self.adapter.rank} only the adapter has any; set init.optimizer=false"
            )
        return self

    @model_validator(mode="after")
    def _memory_fits_the_base(self) -> "Config":
        base, swapped = self.memory.base, self.memory.swap_blocks
        if self.memory.fit == "auto" and not self.adapter.on:
            raise ValueError(
                "memory.fit=auto plans for a frozen base, and with adapter.rank=0 all weights are trained; paste what "
                "`sora plan` prints instead, or set adapter.rank"
            )
        asked = f"memory.base={base}" if base != "compute" else f"memory.swap_blocks={swapped}"
        if (base != "compute" or swapped) and not self.adapter.on:
            raise ValueError(
                f"{asked} is for frozen weights, and with adapter.rank=0 all are trained; set adapter.rank, or drop "
                "the key"
            )
        if swapped > self.model.num_layers:
            raise ValueError(
                f"{asked} and model.num_layers={self.model.num_layers}; swap at most as many blocks as there are"
            )
        if base != "compute" and self.model.float8 != "off":
            raise ValueError(
                f"{asked} widens weights before they are multiplied, and model.float8={self.model.float8} narrows "
                "them; set one of the two"
            )
        widths = {"num_heads * head_dim": self.model.dim, "ffn_dim": self.model.ffn_dim}
        for name, width in widths.items() if base == "nf4" else ():
            if width % 64:
                raise ValueError(
                    f"memory.base=nf4 has a scale for 64 weights of a row, and model.{name}={width} is no multiple of "
                    "64; set memory.base=int8 or fp8"
                )
        return self

    @model_validator(mode="after")
    def _all_is_encoded_before_the_encoders_go(self) -> "Config":
        if self.memory.encode_first and self.data.cache != "latents":
            raise ValueError(
                f"memory.encode_first=true encodes all clips before step 1, and data.cache={self.data.cache} does not "
                "keep them; set data.cache=latents"
            )
        drawn = self.data.caption_weights and self.data.caption_field_dropout
        if self.memory.encode_first and drawn:
            raise ValueError(
                "memory.encode_first=true embeds all captions before step 1, and data.caption_field_dropout="
                f"{self.data.caption_field_dropout:g} makes new ones in every epoch; set one of them to 0"
            )
        return self

    @model_validator(mode="after")
    def _condition_frames_have_pixels(self) -> "Config":
        if (
            self.task == "text_to_video"
            and self.data.cache == "latents"
            and self.objective.needs_pixels
        ):
            raise ValueError(
                "data.cache=latents keeps no pixels, and objective.conditioning trains kinds whose given frames are "
                "encoded from pixels; set data.cache=none, or train t2v, i2v and extend with cond_mode=replace only"
            )
        return self

    @model_validator(mode="after")
    def _experts_can_do_what_is_asked(self) -> "Config":
        expert, sample = self.model.expert, self.sample
        if expert in ("high", "low") and (sample.every or sample.oracle_prompts):
            raise ValueError(
                f"model.expert={expert} computes a part of the noise levels, and a clip needs both experts; set "
                "sample.every=0 and sample.oracle_prompts=0, and sample from two runs with `sora sample --ckpt RUN "
                "--other-expert RUN`"
            )
        if expert == "both" and self.adapter.on:
            raise ValueError(
                "model.expert=both and an adapter: other tools read a file for each expert, so train one with "
                "model.expert=high and one with model.expert=low"
            )
        if self.objective.guidance_scale_2 and not expert:
            raise ValueError(
                f"objective.guidance_scale_2={self.objective.guidance_scale_2:g} is for a model of two experts, and "
                "model.expert is empty; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _validated_kinds_are_trained(self) -> "Config":
        trained = [kind for kind, _ in self.objective.mix]
        unknown = [kind for kind in self.validation.kinds if kind not in trained]
        if self.task == "text_to_video" and unknown:
            raise ValueError(
                f"validation.kinds holds {unknown[0]!r}, which this run does not train; choose among "
                f"{', '.join(trained)}, or give it a share in objective.conditioning"
            )
        return self
