"""A run as a whole: its folder and device, what it starts from, its stages, its length."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sora_train.config.sections.base import Section
from sora_train.config.sections.data import StrList


class RunConfig(Section):
    dir: str = "runs/default"
    """The run folder. A run whose folder has checkpoints goes on from the newest one."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes the GPU if there is one."""
    deterministic: bool | Literal["auto"] = "auto"
    """Bit-for-bit repeatable kernels; `auto`: on for CPU, off for GPU."""
    memory_history: bool = False
    """Record the GPU allocator's history; if the run is out of memory, its snapshot is written beside the report."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch in each rank; 0: the machine's cores divided by its ranks."""
    peak_tflops: float = Field(0.0, ge=0)
    """Peak speed of one device in TFLOP/s, the denominator of `train/mfu`; 0: looked up by the GPU's name. On a CPU or
    an unknown GPU there is then no MFU."""


class InitConfig(Section):
    run: str = ""
    """A run folder, or FOLDER@STEP, whose weights this run starts from: another run, or what `sora ckpt import` has
    written. It counts only while this run has no checkpoint of its own. `model.mask_channel` and `model.fps_embed` may
    be new: they begin at 0."""
    weights: Literal["ema", "live"] = "ema"
    """Start from that run's averaged weights, or from its weights as trained."""
    optimizer: bool = False
    """Take over the optimizer's moments and step count too. The learning rate schedule always begins anew."""


class ResumeConfig(Section):
    run: str = ""
    """A run folder, or FOLDER@STEP, that this run is forked from: it takes over weights, optimizer, averages, place in
    the data, and the metrics up to that step. It counts only while this run has no checkpoint of its own."""
    allow_missing: StrList = ()
    """Patterns of tensors (`ema.*`) that a checkpoint may lack. They start as at step 0; an average starts as the
    weights."""
    probe: bool = True
    """Keep the loss of a small fixed batch in each checkpoint; stop if the loss differs after loading."""
    probe_tolerance: float = Field(0.01, ge=0)
    """Largest relative difference of that loss where layout, device or libraries changed. Where nothing changed and
    kernels are deterministic, the loss must be equal to the last bit."""


class StageConfig(Section):
    name: str
    """Name of the stage, part of its folder's name."""
    groups: dict[str, str] = {}
    """Config groups that this stage chooses: `{buckets: 480p, objective: flow_480p}`."""
    config: dict[str, Any] = {}
    """What this stage sets, nested as in a YAML file: `{train: {steps: 1000}, optim: {lr: 3e-5}}`. It wins over the
    command line and over `overrides`."""
    overrides: StrList = ()
    """The same as texts, as on the command line: `train.steps=1000`, `buckets=480p`."""
    weights: Literal["ema", "live"] = "ema"
    """Start from the averaged weights of the stage before, or from its weights as trained."""
    optimizer: bool = False
    """Take over the optimizer's moments of the stage before."""

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
    """Optimizer steps of the whole run; 0: the length is given by `train.epochs`."""
    epochs: float = Field(0.0, ge=0)
    """Length of the run in passes over the clips, rounded up to whole steps; needs train.steps=0."""
    micro_batches: int = Field(1, ge=1)
    """Micro-batches of one step, summed over all ranks (M). It does not depend on the world size, so a run computes the
    same on any number of ranks."""
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
    """Least share of a step's slots that must hold a micro-batch, or the run refuses to start. Slots are idle where the
    number of ranks does not divide `train.micro_batches`."""
