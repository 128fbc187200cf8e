"""`-m`: every combination of the swept values is a run in a process of its own, in a folder of its own.

A run that fails, or kills its process, cancels none of the others. Each run's folder is `run.dir/ID`, where ID is made
of the swept values alone, so the same sweep again goes on with what is not finished.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sora_train.config import Config
from sora_train.errors import EXIT_FAULT, EXIT_REQUEUE, ConfigError, UserError
from sora_train.tools.sweep.axes import Axis, Job, grid, split
from sora_train.tools.sweep.folder import Sweep, is_done, opened
from sora_train.tools.sweep.local import LOG, Runner, Task
from sora_train.tools.sweep.template import Template


def run_sweep(
    overrides: list[str],
    config_cls: type[Config],
    config_dir: Path | None,
    yaml_file: Path | None,
    script: str | None,
) -> int:
    """Run what of the sweep is not finished; returns the exit code: 0, 1 if any failed, 75 if told to leave.

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
    base = template.compose()
    if base.sweep.method != "grid":
        # Optuna is installed only by those who search.
        from sora_train.tools.sweep.search import run_search

        return run_search(template, base, axes)
    sweep, waiting = unfinished(template, base, axes)
    tasks = start_each(template, sweep, waiting, base.sweep.at_once)
    with Runner(base.sweep.at_once, base.launch) as runner:
        outcome = {task.job.id: code for task, code in runner.results(tasks)}
    return told(sweep, outcome, stopped=runner.stopping)


def unfinished(
    template: Template, base: Config, axes: Sequence[Axis]
) -> tuple[Sweep, list[tuple[Job, Config]]]:
    """The sweep, written down, and those of its runs that have steps to take, with their configurations."""
    folder, jobs = Path(base.run.dir), grid(axes)
    configs = template.composed(jobs, folder)
    sweep = opened(folder, template.fixed, list(axes)).with_jobs(jobs)
    sweep.write()
    waiting = [
        (job, configs[job.id]) for job in jobs if not is_done(folder / job.id, configs[job.id])
    ]
    if len(waiting) < len(jobs):
        print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are finished already", flush=True)
    return sweep, waiting


def start_each(
    template: Template, sweep: Sweep, waiting: list[tuple[Job, Config]], at_once: int
) -> Iterator[Task]:
    """The runs that wait, each told of as it begins."""
    for number, (job, config) in enumerate(waiting, 1):
        yield begun(template, sweep, job, config, at_once, f"{number} of {len(waiting)}")


def begun(
    template: Template, sweep: Sweep, job: Job, config: Config, at_once: int, place: str
) -> Task:
    log = sweep.folder / job.id / LOG if at_once > 1 else None
    print(f"run {place}: {job.id}{f' (its output: {log})' if log else ''}", flush=True)
    return Task(job, template.command(job, sweep.folder, config), log)


def told(sweep: Sweep, outcome: dict[str, int], *, stopped: bool) -> int:
    """Print how the sweep ended; returns its exit code."""
    failed = {id: code for id, code in outcome.items() if code}
    print(
        f"{len(outcome) - len(failed)} of {len(outcome)} runs succeeded; they are under {sweep.folder}"
    )
    if stopped:
        print("the sweep was told to leave; the same command goes on with it", file=sys.stderr)
        return EXIT_REQUEUE
    for id, code in failed.items():
        print(f"failed: {id} (exit code {code}){why(sweep.folder / id)}", file=sys.stderr)
    if failed:
        print("the same command again runs only what is not finished", file=sys.stderr)
    elif outcome:
        print(f"next: sora sweep report {shlex.quote(str(sweep.folder))}")
    return EXIT_FAULT if failed else 0


def why(run_dir: Path) -> str:
    """What a run's folder says of its failure, as the end of a sentence; nothing where it does not."""
    from sora_train.monitoring.status import read_status

    try:
        found = read_status(run_dir)
    except UserError:
        return ""
    return f": {found.why}" if found.state in ("failed", "silent") else ""
