"""From a command line to a run: compose -> Config -> Trainer(cfg).train().

    python -m sora_train.train [FILE.yaml] [--config-dir DIR] [-m] [key=value ...]

is the same job as `sora train`, and what torchrun starts on every rank. A project of one's own calls
`main(recipe)`, or `main(MyTrainer, MyConfig)`. `sora launch` composes once: with `--freeze` the configuration is
written into the run folder and nothing is trained, with `--frozen FILE` a rank reads it from there.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sora_train.config import Config
from sora_train.config.job import OPTIONS, JobConfig, compose_job, freeze
from sora_train.config.overrides import split_yaml_file
from sora_train.errors import run_command
from sora_train.runtime.preemption import listening
from sora_train.tools.launch.check import check_job
from sora_train.tools.sweep.run import run_sweep

if TYPE_CHECKING:
    from sora_train.training.recipe import Recipe
    from sora_train.training.trainer import Trainer


def main(
    project: "Recipe | type[Trainer] | None" = None,
    config_cls: type[Config] = Config,
    argv: Sequence[str] | None = None,
) -> None:
    """Run the training that `argv` (the process's own arguments if None) describes, then exit.

    Args:
        project: a Recipe, or a subclass of Trainer; None: the stock one.
        config_cls: with keys of the project's own, where a Recipe does not say it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.exit(run_command(lambda: train(project, config_cls, arguments)))


def train(
    project: "Recipe | type[Trainer] | None", config_cls: type[Config], argv: list[str]
) -> int:
    """As `main`, but returns the exit code and raises what goes wrong."""
    config_cls = getattr(project, "config", config_cls)
    options, rest = OPTIONS.parse_known_args(argv)
    if options.multirun:
        own = project is not None or config_cls is not Config
        yaml_file, overrides = split_yaml_file(rest)
        script = sys.argv[0] if own else None
        return run_sweep(overrides, config_cls, options.config_dir, yaml_file, script)
    job = compose_job(argv, config_cls)
    if options.freeze:
        check_job(job)
        print(freeze(job))
        return 0
    job = with_what_fits(job)
    with listening():
        if job.stages:
            train_stages(job, project)
        else:
            build_trainer(project, job.config).train()
    return 0


def with_what_fits(job: JobConfig) -> JobConfig:
    """The job with the plan's choice in every run that asks for it (`memory.fit=auto`), which is printed."""
    if all(run.memory.fit != "auto" for run in job.runs):
        return job
    from sora_train.tools.plan.fit import cluster_here, fitted

    def fitting(cfg: Config) -> Config:
        if cfg.memory.fit != "auto":
            return cfg
        found, told = fitted(cfg, cluster_here(cfg.run.device))
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(told), flush=True)
        return found

    if job.stages:
        return JobConfig(job.config, tuple(map(fitting, job.stages)))
    return JobConfig(fitting(job.config))


def build_trainer(project: "Recipe | type[Trainer] | None", cfg: Config) -> "Trainer":
    """The Trainer of a project. Torch loads only here, once the config is known to be right."""
    from sora_train.training.trainer import Trainer

    if project is None:
        return Trainer(cfg)
    return project(cfg) if isinstance(project, type) else Trainer(cfg, project)


def train_stages(job: JobConfig, project: "Recipe | type[Trainer] | None") -> None:
    """Train every stage that is not finished, in order, in this process."""
    from sora_train.runtime import world as distributed
    from sora_train.runtime.control_plane import ControlPlane
    from sora_train.training.run import start_ranks

    cfg = job.config
    # One process group for all stages: a job may join its rendezvous only once.
    world = start_ranks(cfg)
    control = ControlPlane(world, world.timeout)
    try:
        for number, (stage, run) in enumerate(zip(cfg.stages, job.stages, strict=True), start=1):
            done = control.broadcast(is_finished(run) if world.is_main else None)
            if world.is_main:
                tail = ", finished before" if done else ""
                print(f"stage {number} of {len(job.stages)}: {stage.name}{tail}", flush=True)
            if not done:
                build_trainer(project, run).train()
            if run.dry_run:
                return
    finally:
        distributed.stop(world)


def is_finished(cfg: Config) -> bool:
    """Whether a stage has its last checkpoint, and the summary that is written after it."""
    from sora_train.checkpoint import list_checkpoints

    summary = Path(cfg.run.dir) / "summary.json"
    if not summary.is_file():
        return False
    steps = json.loads(summary.read_text())["steps"]
    saved = list_checkpoints(Path(cfg.run.dir) / "checkpoints")
    return bool(saved) and saved[-1].step == steps >= cfg.train.steps


if __name__ == "__main__":
    main()
