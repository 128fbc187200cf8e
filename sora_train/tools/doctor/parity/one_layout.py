"""`sora doctor parallel`: the self-test of a run's layout, without the run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.parallel.checks.self_test import self_test
from sora_train.parallel.degrees import check_degrees, resolve_degrees
from sora_train.parallel.engine import check_engine, check_kernels
from sora_train.runtime import world as distributed
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.health import longest_wait


def check_layout(overrides: Sequence[str], config_dir: Path | None = None) -> str:
    """What there is to say, on rank 0; empty on the others.

    Raises:
        ConfigError: the degrees do not fit the ranks or the model.
        Fault: the layout does not compute what one process does.
    """
    cfg: Config = compose(overrides, config_dir=config_dir).config
    world = distributed.start(cfg.run.device, cfg.run.threads, longest_wait(cfg.health))
    try:
        degrees = resolve_degrees(cfg.parallel, world.size)
        check_degrees(cfg, degrees)
        world = replace(world, cp=degrees.cp)
        check_engine(cfg, degrees, world.device)
        check_kernels(cfg, world.device)
        result = self_test(cfg, world, ControlPlane(world))
    finally:
        distributed.stop(world)
    return f"self-test: {result}" if world.is_main else ""
