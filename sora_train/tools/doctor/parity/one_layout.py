"""`sora doctor parallel`: the self-test of a run's layout, without the run."""

from collections.abc import Sequence
from pathlib import Path

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.parallel.checks.self_test import self_test
from sora_train.parallel.engine import resolve_layout
from sora_train.runtime import world as distributed
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.health import longest_wait


def check_layout(overrides: Sequence[str], config_dir: Path | None = None) -> str:
    """The result of the self-test as a sentence on rank 0; empty on the others.

    Raises:
        ConfigError: the degrees do not fit the ranks or the model.
        Fault: the layout does not compute what one process does.
    """
    cfg: Config = compose(overrides, config_dir=config_dir).config
    world = distributed.start(cfg.run.device, cfg.run.threads, longest_wait(cfg.health))
    try:
        world, layout = resolve_layout(cfg, world)
        result = self_test(cfg, layout, ControlPlane(world))
    finally:
        distributed.stop(world)
    return f"self-test: {result}" if world.is_main else ""
