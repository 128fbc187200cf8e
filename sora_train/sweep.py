"""A sweep: Hydra's grammar names the values, every combination is a run in a process of its own.

A job that fails, or kills its process, cancels none of the others. Each job's folder is `run.dir/ID`, where ID is
made of the swept overrides alone, so the same sweep again resumes its runs.
"""

import hashlib
import itertools
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from sora_train.config import Config
from sora_train.config.compose import compose, parse_overrides
from sora_train.errors import EXIT_FAULT, ConfigError

MAX_ID = 80
"""Longest folder name a job gets before a hash shortens it."""


@dataclass(frozen=True)
class Job:
    """One combination of a sweep: the folder name it gets and all its overrides."""

    id: str
    overrides: tuple[str, ...]


def expand(overrides: list[str]) -> tuple[list[str], list[Job]]:
    """The overrides that are the same in all jobs, and the jobs. ConfigError for what cannot be enumerated."""
    fixed: list[str] = []
    swept: dict[str, list[str]] = {}
    for text, override in zip(overrides, parse_overrides(overrides), strict=True):
        if not override.is_sweep_override():
            fixed.append(text)
        elif override.key_or_group == "run.dir":
            raise ConfigError(
                f"'{text}': a sweep names its folders itself, below run.dir; give one run.dir"
            )
        elif override.is_discrete_sweep():
            key = override.get_key_element()
            swept[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise ConfigError(
                f"'{text}' cannot be enumerated; list its values: {override.key_or_group}=a,b,c"
            )
    jobs = [
        Job(_job_id(chosen), (*fixed, *chosen)) for chosen in itertools.product(*swept.values())
    ]
    return fixed, jobs


def run_sweep(
    overrides: list[str],
    config_cls: type[Config],
    config_dir: Path | None,
    yaml_file: Path | None,
    script: str | None,
) -> int:
    """Run every job in turn; 1 if any failed, the failed ones listed at the end.

    `script` is the user's own training file, None for `sora_train.train`. All jobs are composed first, so that a
    wrong value is met before the first hour of work.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "-m starts its runs one after the other and cannot itself run under torchrun; sweep outside it"
        )
    fixed, jobs = expand(overrides)
    base = compose(
        fixed, config_cls=config_cls, config_dir=config_dir, yaml_file=yaml_file
    ).config.run.dir
    placed = [(job, [*job.overrides, f'run.dir="{base}/{job.id}"']) for job in jobs]
    for _, arguments in placed:
        compose(arguments, config_cls=config_cls, config_dir=config_dir, yaml_file=yaml_file)
    command = [sys.executable, *([script] if script else ["-m", "sora_train.train"])]
    if yaml_file is not None:
        command.append(str(yaml_file))
    if config_dir is not None:
        command += ["--config-dir", str(config_dir)]
    failed = []
    for number, (job, arguments) in enumerate(placed, 1):
        print(f"run {number} of {len(jobs)}: {job.id}", flush=True)
        code = subprocess.run([*command, *arguments], check=False).returncode
        if code:
            failed.append(f"{job.id} (exit code {code})")
    print(f"{len(jobs) - len(failed)} of {len(jobs)} runs succeeded; they are under {base}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return EXIT_FAULT if failed else 0


def _job_id(chosen: tuple[str, ...]) -> str:
    """A folder name from the swept overrides, the same whatever their order on the command line."""
    text = ",".join(sorted(chosen)) or "only"
    name = re.sub(r"[^A-Za-z0-9.,=_-]+", "-", text)
    if name == text and len(name) <= MAX_ID:
        return name
    return f"{name[:MAX_ID]}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
