"""A SLURM job: one torchrun a node by srun, which saves and goes on in the queue when its time is up."""

import re
import shlex
import subprocess
from collections.abc import Sequence

from sora_train.config.job import FOLDER
from sora_train.errors import EXIT_REQUEUE, EXIT_USER, ConfigError, Fault
from sora_train.tools.launch.job import LOGS, Job, exports, one_line


def render(job: Job, tasks: Sequence[Job] = ()) -> str:
    """The batch script; with `tasks`, of an array whose task N runs the Nth of them. `job` is what they share."""
    inside = node_script(job, frozen='"$FROZEN"' if tasks else "")
    step = " ".join([*container_options(job), "bash", "-c", shlex.quote(inside)])
    body = [
        "set -uo pipefail",
        *exports(job.environment()),
        "# The address at which the cluster knows the first node; its own name may be 127.0.0.1 there.",
        'HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "HEAD_ADDRESS=$(scontrol show node \"$HEAD_NODE\" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')",
        f"MEETING_PORT={job.cfg.port or '$((20000 + SLURM_JOB_ID % 10000))'}",
        *(task_lines(tasks) if tasks else [f"RUN_DIR={shlex.quote(str(job.run_dir))}"]),
        f'LOGS="$RUN_DIR"/{FOLDER}/{LOGS}/"$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"',
        'mkdir -p "$LOGS" && touch "$LOGS/started"',
        "export HEAD_ADDRESS MEETING_PORT LOGS",
        # What sbatch was asked for, srun does not take over.
        *([f"export SRUN_CPUS_PER_TASK={job.cfg.cpus}"] if job.cfg.cpus else []),
        "",
        "# Single quotes: SLURM_NODEID is each node's own. The last nodes have as long to leave as a save may take.",
        f"srun --wait={max(60, job.cfg.lead_seconds)} {step}",
        "CODE=$?",
        "",
        *AFTERWARDS,
    ]
    return "\n".join(["#!/usr/bin/env bash", *directives(job, len(tasks)), *body, ""])


def task_lines(tasks: Sequence[Job]) -> list[str]:
    """Shell lines that give a task of an array its run folder and its configuration."""
    return [
        "# Task N has the Nth of these run folders, and the configuration that is frozen in it.",
        "RUN_DIRS=(", *(f"  {shlex.quote(str(task.run_dir))}" for task in tasks), ")",
        "CONFIGS=(", *(f"  {shlex.quote(str(task.frozen))}" for task in tasks), ")",
        "RUN_DIR=${RUN_DIRS[$SLURM_ARRAY_TASK_ID]}",
        "export FROZEN=${CONFIGS[$SLURM_ARRAY_TASK_ID]}",
    ]  # fmt: skip


AFTERWARDS = [
    f"# 0: done. {EXIT_USER}: a mistake of the configuration. {EXIT_REQUEUE}, or a signal of somebody's who wants",
    "# the nodes: everything is saved, and the same job goes on when it is its turn again. Anything else is a fault:",
    "# it goes on where a checkpoint was saved since this start, so that one that always comes back ends the job.",
    "case $CODE in",
    f"0 | {EXIT_USER}) AGAIN= ;;",
    f"{EXIT_REQUEUE} | 138 | 143) AGAIN=yes ;;",
    '*) AGAIN=$(find "$RUN_DIR" -maxdepth 4 -path \'*/checkpoints/step-*/MANIFEST.json\' -newer "$LOGS/started") ;;',
    "esac",
    'if [ -n "$AGAIN" ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
    "exit $CODE",
]


def directives(job: Job, tasks: int = 0) -> list[str]:
    cfg = job.cfg
    limit = f"%{cfg.array_limit}" if cfg.array_limit else ""
    gpus = job.ranks if cfg.gpus < 0 else cfg.gpus
    options = {
        "job-name": job.name,
        "nodes": str(cfg.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(gpus) if gpus else "",
        "cpus-per-task": str(cfg.cpus) if cfg.cpus else "",
        "mem": cfg.memory,
        "time": cfg.time,
        "partition": cfg.partition,
        "account": cfg.account,
        "qos": cfg.qos,
        "constraint": cfg.constraint,
        "exclude": cfg.exclude,
        "chdir": str(job.working_dir),
        "array": f"0-{tasks - 1}{limit}" if tasks else "",
        # A percent sign begins one of SLURM's own patterns.
        "output": str(job.logs).replace("%", "%%") + f"/slurm-{'%A_%a' if tasks else '%j'}.out",
        # Not to the batch shell, which would only forward it: srun's steps get it, and so all ranks.
        "signal": f"USR1@{cfg.lead_seconds}" if cfg.lead_seconds else "",
        "open-mode": "append",
    }
    lines = [
        f"--{key}={shlex.quote(one_line(key, value))}" for key, value in options.items() if value
    ]
    lines += ["--requeue", *map(option_line, cfg.options)]
    return [f"#SBATCH {line}" for line in lines]


def option_line(option: str) -> str:
    """An option of `launch.options` as sbatch reads it: its value is one word, whatever blanks it holds."""
    one_line("options", option)
    try:
        words = shlex.split(option)
    except ValueError:
        words = []
    flag, mark, value = option.partition("=")
    if len(words) == 1 or not option.startswith("-"):
        return option
    if mark and " " not in flag:
        return f"{flag}={shlex.quote(value)}"
    flag, _, value = option.partition(" ")
    return f"{flag} {value}" if len(words) == 2 else f"{flag} {shlex.quote(value)}"


def node_script(job: Job, frozen: str = "") -> str:
    """What runs on each node, inside the container if there is one."""
    command = job.node_command(
        node='"$SLURM_NODEID"',
        address='"$HEAD_ADDRESS"',
        port='"$MEETING_PORT"',
        logs='"$LOGS/node-$SLURM_NODEID"',
        frozen=frozen,
    )
    inside = "\n".join([*job.cfg.setup, f"exec {command}"])
    return in_apptainer(job, inside) if runtime(job) == "apptainer" else inside


def runtime(job: Job) -> str:
    return job.cfg.container_runtime if job.cfg.container else ""


def mounts(job: Job) -> list[str]:
    here = {str(job.working_dir), str(job.run_dir)}
    return [*job.cfg.mounts, *(f"{path}:{path}" for path in sorted(here))]


def container_options(job: Job) -> list[str]:
    if runtime(job) != "pyxis":
        return []
    return [
        f"--container-image={shlex.quote(job.cfg.container)}",
        f"--container-mounts={shlex.quote(','.join(mounts(job)))}",
        f"--container-workdir={shlex.quote(str(job.working_dir))}",
    ]


def in_apptainer(job: Job, inside: str) -> str:
    binds = " ".join(f"--bind {shlex.quote(mount)}" for mount in mounts(job))
    image, folder = shlex.quote(job.cfg.container), shlex.quote(str(job.working_dir))
    return f"exec apptainer exec --nv {binds} --pwd {folder} {image} bash -c {shlex.quote(inside)}"


def submit(script: str) -> str:
    """Hand the script to sbatch; returns the job's id.

    Raises:
        ConfigError: SLURM refuses it; tells why in its words.
        Fault: there is no sbatch here.
    """
    # Some clusters take a job that no node of theirs can ever run, and let it wait for ever.
    tried = sbatch(script, "--test-only")
    if tried.returncode and NEVER in tried.stderr:
        raise refused(tried.stderr)
    done = sbatch(script, "--parsable")
    if done.returncode:
        raise refused(done.stderr)
    return done.stdout.strip().partition(";")[0]


NEVER = "Requested node configuration is not available"


def sbatch(script: str, option: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            ["sbatch", option], input=script, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise Fault(
            "there is no sbatch on this machine; run this on a login node, or take --print and submit the script there"
        ) from None


def refused(output: str) -> ConfigError:
    """In SLURM's own words, with what helps."""
    words = re.sub(
        r"^(sbatch: )?(error: |allocation failure: )?", "", output.strip(), flags=re.MULTILINE
    )
    return ConfigError(f"SLURM refuses the job: {' '.join(words.split())}{remedy(words)}")


def remedy(message: str) -> str:
    """What helps against the refusals that are met most."""
    for word, advice in (
        ("partition", "; `sinfo -s` lists the partitions for launch.partition"),
        ("account", "; `sacctmgr show assoc user=$USER` lists the accounts for launch.account"),
        ("qos", "; `sacctmgr show qos` lists those for launch.qos"),
        ("node count", "; lower launch.nodes or choose another launch.partition"),
        (
            "generic resource",
            "; `sinfo -o '%P %G'` lists the GPUs of each partition for launch.gpus",
        ),
        (
            "node configuration",
            "; lower launch.nodes, launch.gpus, launch.cpus or launch.memory, or choose another launch.partition",
        ),
    ):
        if word in message.lower():
            return advice
    return ""
