"""What a project of one's own replaces: a builder for each part of a run.

    recipe = Recipe(config=MyConfig, model=MyModel, callbacks=(log_weight_norm,))
    main(recipe)

The same can be done by subclassing the Trainer. Nothing is registered anywhere.
"""

import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sora_train.checkpoint.meta import CheckpointMeta
from sora_train.config import Config
from sora_train.errors import UserError
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

    config: type[Config] = Config
    """With keys of the project's own."""
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


def load_recipe(file: Path) -> Recipe:
    """The `recipe` of a project's file, which is run as a module for it, not as a program.

    Raises:
        UserError: there is no such file, or it names no Recipe `recipe`.
    """
    if not file.is_file():
        raise UserError(
            f"--project {file}: there is no such file; give the one that trained the run"
        )
    sys.path.insert(0, str(file.resolve().parent))
    try:
        names = runpy.run_path(str(file), run_name=file.stem)
    finally:
        sys.path.pop(0)
    recipe = names.get("recipe")
    if not isinstance(recipe, Recipe):
        raise UserError(
            f"--project {file} has no `recipe`; write `recipe = Recipe(config=..., model=...)` at its top level, see "
            "docs/extend.md"
        )
    return recipe
