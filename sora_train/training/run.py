"""What a run is before anything of it is built: its configuration, its ranks, and how they keep in step."""

from dataclasses import dataclass
from datetime import timedelta

from sora_train.config import Config
from sora_train.monitoring.run_folder import RunFolder
from sora_train.parallel.context.peers import ContextParallelSharing
from sora_train.parallel.degrees import Degrees
from sora_train.parallel.engine import resolve_layout
from sora_train.parallel.layout import Layout
from sora_train.runtime import world as distributed
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.health import Health, longest_wait, record_collectives
from sora_train.runtime.world import World


@dataclass(frozen=True)
class RunContext:
    """What every part of a run may know. It is handed around instead of the Trainer."""

    cfg: Config
    world: World
    layout: Layout
    control: ControlPlane
    """Small exchanges between all ranks."""
    health: Health
    """Phases with deadlines, and what all ranks have agreed on."""
    folder: RunFolder

    @property
    def is_main(self) -> bool:
        return self.world.is_main

    @property
    def degrees(self) -> Degrees:
        return self.layout.degrees

    @property
    def sharing(self) -> ContextParallelSharing:
        """The ranks that hold the same clips as this one."""
        return ContextParallelSharing(self.control, self.layout.context)


def join(cfg: Config) -> RunContext:
    """Meet the other ranks and take the run folder. What does not fit is refused before any clip is read.

    Raises:
        ConfigError: the degrees, the engine or a kernel do not fit the job or the machine.
        UserError: the run folder is in use, or cannot be made.
        Fault: not all ranks came.
    """
    wait = longest_wait(cfg.health)
    world = start_ranks(cfg)
    try:
        distributed.set_determinism(cfg.run.deterministic, world.device)
        world, layout = resolve_layout(cfg, world)
        control = ControlPlane(world, wait)
        folder = control.together(lambda: RunFolder(cfg, is_main=world.is_main))
        health = Health(cfg.health, control, folder.path, place_of=layout.degrees.place_of)
        return RunContext(cfg, world, layout, control, health, folder)
    except BaseException:
        # Whoever starts again in this process finds no group left.
        distributed.stop(world)
        raise


def start_ranks(cfg: Config) -> World:
    """Make the process group of a run, or of a chain of stages, with the deadlines that its configuration sets."""
    record_collectives(cfg.run.dir)
    meeting = timedelta(seconds=cfg.health.meeting_seconds)
    return distributed.start(cfg.run.device, cfg.run.threads, longest_wait(cfg.health), meeting)
