"""Stages: runs that follow each other in one folder, each beginning with the weights of the one before.

    run.dir/stages/01-low/    a run folder like any other
    run.dir/stages/02-high/   begins with the last checkpoint of 01-low

A stage counts its own steps and has its own learning rate schedule. The same command again goes on in
the stage that is not finished.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sora_train.config import Config, StageConfig
from sora_train.config.schema import flatten, keys, overlaid
from sora_train.errors import ConfigError


class ComposeWith(Protocol):
    """Composes the run anew with further overrides, and with nested values that count after all overrides."""

    def __call__(self, overrides: Sequence[str], values: Mapping[str, Any], /) -> Config: ...


def stage_dir(cfg: Config, number: int) -> Path:
    return Path(cfg.run.dir) / "stages" / f"{number + 1:02d}-{cfg.stages[number].name}"


def compose_stages(cfg: Config, compose_with: ComposeWith) -> tuple[Config, ...]:
    """The configurations of all stages, checked before the first one trains.

    Raises:
        ConfigError: two stages have one name, a stage sets a key that belongs to the chain, or its configuration is
            wrong; the sentence begins with the stage.
    """
    names = [stage.name for stage in cfg.stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"stages have the names {', '.join(names)}; give each a name of its own")
    return tuple(_compose_stage(cfg, number, compose_with) for number in range(len(names)))


def _compose_stage(cfg: Config, number: int, compose_with: ComposeWith) -> Config:
    stage = cfg.stages[number]
    try:
        _require_keys_of_its_own(stage, type(cfg))
        choices = [f"{group}={option}" for group, option in stage.groups.items()]
        values = overlaid(stage.config, _chain_values(cfg, number))
        return compose_with([*choices, *stage.overrides], values)
    except ConfigError as error:
        lines = [f"stage {stage.name!r}: {line}" for line in str(error).splitlines()]
        raise ConfigError("\n".join(lines)) from None


def _require_keys_of_its_own(stage: StageConfig, config_cls: type[Config]) -> None:
    known = keys(config_cls)
    for group in stage.groups:
        if group in known:
            raise ConfigError(f"'{group}' is a key and no config group; set it under `config`")
    written = [text.partition("=")[0].lstrip("+~") for text in stage.overrides]
    for key in [*written, *flatten(stage.config)]:
        if key in ("run.dir", "init", "resume.run", "stages") or key.startswith(
            ("init.", "stages.")
        ):
            raise ConfigError(f"{key} belongs to the chain of stages; leave it out")


def _chain_values(cfg: Config, number: int) -> dict[str, Any]:
    """What the chain sets in each of its stages: folder and name, and what the stage begins with."""
    stage = cfg.stages[number]
    values: dict[str, Any] = {
        "stages": [],
        "name": f"{cfg.name}: {stage.name}",
        "run": {"dir": str(stage_dir(cfg, number))},
    }
    if number > 0:
        values["resume"] = {"run": ""}
        values["init"] = {
            "run": str(stage_dir(cfg, number - 1)),
            "weights": stage.weights,
            "optimizer": stage.optimizer,
        }
    return values
