"""What a project of one's own replaces: a builder for each part of a run.

    main(Recipe(model=MyModel, callbacks=(log_weight_norm,)), MyConfig)

The same can be done by subclassing the Trainer. Nothing is registered anywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from sora_train.checkpoint.meta import CheckpointMeta
from sora_train.objectives import Objective
from sora_train.training.components import (
    Components,
    build_data,
    build_model,
    build_objective,
)
from sora_train.training.outputs.samples import write_samples
from sora_train.training.outputs.validation import validate
from sora_train.training.pipeline.data import TrainingData
from sora_train.training.run import RunContext

Callback = Callable[[Any, dict[str, float]], None]
"""Called on every rank after each step with the trainer and the step's metrics, which it may add to."""


@dataclass(frozen=True)
class Recipe:
    """The builders of a run. Each default is what the stock Trainer does."""

    model: Callable[..., nn.Module] = build_model
    """(cfg) -> the trainable model on the CPU, its weights drawn from `cfg.seed`. One that takes `empty=False` as well
    is asked for a model without memory where no rank should hold the whole."""
    objective: Callable[[RunContext, Components], Objective] = build_objective
    """What is minimised; model, VAE, spec and data are there."""
    data: Callable[[RunContext, Components, CheckpointMeta | None], TrainingData] = build_data
    """What is trained on; the third argument is that of the checkpoint that the run goes on from."""
    callbacks: tuple[Callback, ...] = ()
    validate: Callable[[RunContext, Components], dict[str, float]] = validate
    """Metrics of the held-out clips."""
    sample: Callable[[RunContext, Components, int], None] = write_samples
    """Writes clips of the averaged weights as they are at a step."""
