"""Stages: runs that follow each other in one folder, each beginning with the weights of the one before.

    run.dir/stages/01-low/    a run folder like any other
    run.dir/stages/02-high/   begins with the last checkpoint of 01-low

A stage counts its own steps and has its own learning rate schedule. The same command again goes on in
the stage that is not finished.
"""

from collections.abc import Callable
from pathlib import Path

from sora_train.config import Config, StageConfig
from sora_train.errors import ConfigError

Compose = Callable[[list[str]], Config]
"""The run's configuration with some overrides more."""


def stage_dir(cfg: Config, number: int) -> Path:
    return Path(cfg.run.dir) / "stages" / f"{number + 1:02d}-{cfg.stages[number].name}"


def overrides_of(cfg: Config, number: int) -> list[str]:
    """The overrides that turn the run's configuration into that of a stage."""
    stage = cfg.stages[number]
    for text in stage.overrides:
        key = text.partition("=")[0].lstrip("+~")
        if key in ("run.dir", "stages") or key.startswith(("init.", "resume.run")):
            raise ConfigError(
                f"stage {stage.name!r} sets {key}, which belongs to the chain of stages; leave it out"
            )
    return [
        *stage.overrides,
        "stages=[]",
        f"run.dir='{stage_dir(cfg, number)}'",
        f"name='{cfg.name}: {stage.name}'",
        *_hand_over(cfg, number, stage),
    ]


def _hand_over(cfg: Config, number: int, stage: StageConfig) -> list[str]:
    if number == 0:
        return []
    return [
        "resume.run=''",
        f"init.run='{stage_dir(cfg, number - 1)}'",
        f"init.weights={stage.weights}",
        f"init.optimizer={str(stage.optimizer).lower()}",
    ]


def compose_stages(cfg: Config, compose_with: Compose) -> tuple[Config, ...]:
    """The configurations of all stages, checked before the first one trains.

    Raises:
        ConfigError: two stages have one name, or a stage sets a key that belongs to the chain.
    """
    names = [stage.name for stage in cfg.stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"stages have the names {', '.join(names)}; give each a name of its own")
    return tuple(compose_with(overrides_of(cfg, number)) for number in range(len(names)))
