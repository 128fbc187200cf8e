"""`-m`: every combination of the swept values is a run in a process of its own, in a folder of its own.

A run that fails, or kills its process, cancels none of the others. Each run's folder is `run.dir/ID`, where ID is made
of the swept values alone, so the same sweep again goes on with what is not finished.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sora_train.config import Config
from sora_train.errors import ConfigError
from sora_train.tools.sweep.axes import Axis, SweepRun, grid, split
from sora_train.tools.sweep.folder import Sweep, is_done, open_sweep
from sora_train.tools.sweep.local import Runner, Task, report_outcome, started_task
from sora_train.tools.sweep.template import Template


def run_sweep(
    overrides: list[str],
    config_cls: type[Config],
    config_dir: Path | None,
    yaml_file: Path | None,
    script: str | None,
) -> int:
    """Run what of the sweep is not finished; returns the exit code: 0, 1 if any failed, 75 if asked to leave.

    `script` is the user's own training file, None for `sora_train.train`. All runs are composed first, so that a
    wrong value is met before the first hour of work.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "-m starts its runs one after the other and cannot itself run under torchrun; sweep outside it, with "
            "launch.ranks=N for runs of several ranks"
        )
    fixed, axes = split(overrides)
    template = Template(fixed, config_cls, config_dir, yaml_file, script)
    base = template.base(axes)
    if base.sweep.method != "grid":
        # Optuna is installed only by those who search.
        from sora_train.tools.sweep.search import run_search

        return run_search(template, base, axes)
    sweep, waiting = unfinished(template, base, axes)
    tasks = start_each(template, sweep, waiting, base.sweep.at_once)
    with Runner(base.sweep.at_once, base.launch) as runner:
        outcome = {task.run.id: code for task, code in runner.results(tasks)}
    return report_outcome(sweep, outcome, stopped=runner.stopping)


def unfinished(
    template: Template, base: Config, axes: Sequence[Axis]
) -> tuple[Sweep, list[tuple[SweepRun, Config]]]:
    """The sweep, written down, and those of its runs that have steps to take, with their configurations."""
    folder, runs = Path(base.run.dir), grid(axes)
    configs = template.compose_all(runs, folder)
    sweep = open_sweep(folder, template.fixed, list(axes)).with_runs(runs)
    sweep.write()
    waiting = [
        (run, configs[run.id]) for run in runs if not is_done(folder / run.id, configs[run.id])
    ]
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already", flush=True)
    return sweep, waiting


def start_each(
    template: Template, sweep: Sweep, waiting: list[tuple[SweepRun, Config]], at_once: int
) -> Iterator[Task]:
    """The runs that wait, each announced as it begins."""
    for number, (run, config) in enumerate(waiting, 1):
        yield started_task(template, sweep, run, config, at_once, f"{number} of {len(waiting)}")
