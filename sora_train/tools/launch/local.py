"""A job on this machine."""

import os
import shlex
import sys
from typing import NoReturn

from sora_train.config.sections.launch import LaunchConfig
from sora_train.errors import ConfigError
from sora_train.tools.launch.job import Job, exports
from sora_train.tools.sweep.local import visible_gpus


def render(job: Job) -> str:
    """The shell script."""
    if job.cfg.nodes > 1:
        raise ConfigError(
            f"launch.nodes={job.cfg.nodes}, and `sora launch local` starts the ranks of this machine alone; use `sora "
            "launch slurm` or `k8s`, or start launch/torchrun.sh on each node"
        )
    logs = shlex.quote(str(job.logs / "local"))
    command = job.node_command(
        node="0", address="127.0.0.1", port=str(job.cfg.port), logs=logs, python=sys.executable
    )
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            "set -euo pipefail",
            f"cd -- {shlex.quote(str(job.working_dir))}",
            *exports(job.environment()),
            f"mkdir -p {logs}",
            *job.cfg.setup,
            f"exec {command}",
            "",
        ]
    )


def run(job: Job) -> NoReturn:
    """Become the job: whoever started this process signals the ranks' own launcher, and gets its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp("bash", ["bash", "-c", render(job)])


def ranks_here(cfg: LaunchConfig) -> int:
    """`launch.ranks`, or the GPUs of this machine; found without torch, whose import takes seconds."""
    if cfg.ranks:
        return cfg.ranks
    return max(1, len(visible_gpus()))
