"""A sweep as one SLURM array: a task for each run, with a run folder and a frozen configuration of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sora_train.config import Config
from sora_train.config.job import JobConfig, freeze, split_script, with_stages
from sora_train.config.overrides import split_yaml_file
from sora_train.errors import UserError
from sora_train.tools.launch.check import check_job
from sora_train.tools.launch.job import Job
from sora_train.tools.launch.local import ranks_here
from sora_train.tools.sweep.axes import SweepRun, split
from sora_train.tools.sweep.run import unfinished
from sora_train.tools.sweep.template import Template


def array_of(arguments: list[str], config_dir: Path | None) -> tuple[Job, list[Job]]:
    """What the runs of a sweep share, and a job for each that is not finished, frozen in its folder.

    Raises:
        ConfigError: a run is described wrongly, or does not fit its ranks; none is frozen then.
        UserError: the sweep is a search, or of a training file of one's own.
    """
    script, arguments = split_script(arguments)
    if script is not None:
        raise UserError(
            f"an array composes its runs itself, and only {script} knows its own keys; write a command line for "
            "each run into a file, and submit launch/slurm_array.sbatch with it"
        )
    yaml_file, overrides = split_yaml_file(arguments)
    fixed, axes = split(overrides)
    template = Template(fixed, config_dir=config_dir, yaml_file=yaml_file)
    base = template.base(axes)
    if base.sweep.method != "grid":
        raise UserError(
            f"sweep.method={base.sweep.method} proposes a run from the results of others, so its runs cannot be "
            "submitted at once; let one job run the search: sora train -m ..., with sweep.at_once=N"
        )
    sweep, waiting = unfinished(template, base, axes)
    frozen = {run.id: checked(template, run, config, sweep.folder) for run, config in waiting}
    name = base.name if base.name != "default" else sweep.folder.name
    folder, ranks = sweep.folder.resolve(), ranks_here(base.launch)
    shared = Job(name, folder, folder, Path.cwd(), base.launch, ranks)
    return shared, [
        replace(shared, run_dir=folder / id, frozen=freeze(one).resolve())
        for id, one in frozen.items()
    ]


def checked(template: Template, sweep_run: SweepRun, config: Config, folder: Path) -> JobConfig:
    """A run with its stages, which fits its ranks and finds its weights."""

    def compose_with(overrides: Sequence[str], values: Mapping[str, Any]) -> Config:
        return template.compose([*template.overrides_of(sweep_run, folder), *overrides], values)

    run = with_stages(config, compose_with)
    check_job(run)
    return run
