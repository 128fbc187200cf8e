"""A run as a whole: its folder and device, what it starts from, its stages, its length."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sora_train.config.sections.base import Section
from sora_train.config.sections.data import StrList


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
    groups: dict[str, str] = {}
    """Config groups that this stage chooses: `{buckets: 480p, objective: flow_480p}`."""
    config: dict[str, Any] = {}
    """What this stage sets, nested as in a YAML file: `{train: {steps: 1000}, optim: {lr: 3e-5}}`. It wins over the
    command line and over `overrides`."""
    overrides: StrList = ()
    """The same as texts, as on the command line: `train.steps=1000`, `buckets=480p`."""
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


class ElasticConfig(Section):
    min_efficiency: float = Field(0.5, ge=0, le=1)
    """Least share of a step's slots that must hold a micro-batch: where the ranks do not divide
    `train.micro_batches` the slots left over idle, and below this share the run refuses to start."""
