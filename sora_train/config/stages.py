"""Stages: runs that follow each other in one folder, each beginning with the weights of the one before.

    run.dir/stages/01-low/    a run folder like any other
    run.dir/stages/02-high/   begins with the last checkpoint of 01-low

A stage counts its own steps and has its own learning rate schedule. The same command again goes on in
the stage that is not finished.
"""

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from sora_train.config import Config, StageConfig
from sora_train.errors import ConfigError

if TYPE_CHECKING:
    from sora_train.training.trainer import Trainer

Compose = Callable[[list[str]], Config]
"""The run's configuration with some overrides more."""


def stage_dir(cfg: Config, number: int) -> Path:
    return Path(cfg.run.dir) / "stages" / f"{number + 1:02d}-{cfg.stages[number].name}"


def overrides_of(cfg: Config, number: int) -> list[str]:
    """What makes the run's configuration that of a stage."""
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


def is_done(cfg: Config) -> bool:
    """Whether a stage has its last checkpoint, and the summary that is written after it."""
    from sora_train import checkpoint as checkpoints

    summary = Path(cfg.run.dir) / "summary.json"
    if not summary.is_file():
        return False
    steps = json.loads(summary.read_text())["steps"]
    found = checkpoints.list_checkpoints(Path(cfg.run.dir) / "checkpoints")
    return bool(found) and found[-1].step == steps >= cfg.train.steps


def compose_stages(cfg: Config, compose: Compose) -> tuple[Config, ...]:
    """The configurations of all stages, checked before the first one trains.

    Raises:
        ConfigError: two stages of one name, or a stage that says what the chain does.
    """
    names = [stage.name for stage in cfg.stages]
    if len(set(names)) < len(names):
        raise ConfigError(f"stages have the names {', '.join(names)}; give each a name of its own")
    return tuple(compose(overrides_of(cfg, number)) for number in range(len(names)))


def train_stages(cfg: Config, runs: Sequence[Config], trainer_cls: "type[Trainer]") -> None:
    """Train every stage that is not finished, in order, in this process."""
    from sora_train.runtime import world as distributed
    from sora_train.runtime.health import longest_wait, record_collectives

    names = [stage.name for stage in cfg.stages]
    # One process group for all of them: a job may join its rendezvous only once.
    record_collectives(cfg.run.dir)
    wait = longest_wait(cfg.health)
    world = distributed.start(
        cfg.run.device, cfg.run.threads, wait, timedelta(seconds=cfg.health.meeting_seconds)
    )
    control = distributed.ControlPlane(world, wait)
    try:
        for number, run in enumerate(runs):
            done = control.broadcast(is_done(run) if world.is_main else None)
            if world.is_main:
                tail = ", finished before" if done else ""
                print(f"stage {number + 1} of {len(runs)}: {names[number]}{tail}", flush=True)
            if not done:
                trainer_cls(run).train()
            if run.dry_run:
                return
    finally:
        distributed.stop(world)
