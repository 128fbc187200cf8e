"""How jobs are started, one or the many of a sweep, here or on a cluster; nothing that is trained depends on it."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sora_train.config.sections.base import Section
from sora_train.config.sections.data import StrList


class LaunchConfig(Section):
    nodes: int = Field(1, ge=1)
    """Number of nodes."""
    ranks: int = Field(0, ge=0)
    """Processes per node, one for each GPU; 0: as many as this machine has GPUs, or one without a GPU."""
    gpus: int = Field(-1, ge=-1)
    """GPUs requested per node; -1: as many as `launch.ranks`; 0: none, for a cluster of CPUs."""
    cpus: int = Field(0, ge=0)
    """CPU cores requested per node; 0: the scheduler's default."""
    memory: str = ""
    """Memory requested per node in the scheduler's notation (`900G`, `0` for all); empty: the scheduler's default."""
    time: str = ""
    """Time limit of one job in SLURM's notation (`24:00:00`, `2-00:00:00`); the run then goes on in the next job.
    Empty: the partition's limit."""
    lead_seconds: int = Field(300, ge=0)
    """Seconds before the limit at which ranks are told to save and exit; more than a checkpoint takes."""
    partition: str = ""
    """SLURM's partition; empty: its default."""
    account: str = ""
    """SLURM's account that is charged; empty: your default."""
    qos: str = ""
    """SLURM's quality of service; empty: your default."""
    constraint: str = ""
    """Features that nodes must have, in SLURM's notation: `h100&ib`."""
    exclude: str = ""
    """Nodes that are not used, in SLURM's notation: `gpu[03,07]`."""
    port: int = Field(0, ge=0, le=65535)
    """Port at which ranks meet; 0: a port computed from the job's id, or a free one on a single machine."""
    interface: str = ""
    """Network interface of NCCL and gloo (`ib0`, `eth0`); empty: their own choice."""
    container: str = ""
    """Image in which ranks run: a SquashFS file or `registry#image:tag`; empty: none."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """Program that starts containers on the nodes."""
    mounts: StrList = ()
    """Folders that the container sees, as `HOST:INSIDE`; the run folder and the working directory are always there."""
    setup: StrList = ()
    """Shell lines that run before the ranks of a node: `module load cuda`, `source .venv/bin/activate`."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the ranks."""
    python: str = "python"
    """Python interpreter on the nodes."""
    array_limit: int = Field(0, ge=0)
    """Most runs of a sweep (`sora launch slurm -m`) that SLURM runs at the same time; 0: no limit."""
    options: StrList = ()
    """Further lines for the scheduler, in its own notation: `--reservation=mine`."""
    offline: bool = True
    """Refuse to fetch weights from a hub during the job; `sora fetch` downloads them beforehand."""
    image: str = ""
    """Kubernetes: the image of the ranks."""
    namespace: str = ""
    """Kubernetes: the namespace; empty: kubectl's own."""
    claim: str = ""
    """Kubernetes: the volume claim with the working directory, run folders and clips, mounted at `launch.mount`."""
    mount: str = "/workspace"
    """Kubernetes: where `launch.claim` is mounted, and the working directory."""

    @field_validator("env")
    @classmethod
    def _are_names(cls, value: dict[str, str]) -> dict[str, str]:
        bad = [name for name in value if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)]
        if bad:
            raise ValueError(
                f"launch.env holds {bad[0]!r}, which is no variable's name; use letters, digits and _"
            )
        return value

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        if value and not re.fullmatch(r"(\d+-)?\d+(:\d{2}){0,2}", value):
            raise ValueError("must be like 90 (minutes), 24:00:00 or 2-00:00:00")
        return value

    @model_validator(mode="after")
    def _has_time_to_train(self) -> "LaunchConfig":
        limit = limit_seconds(self.time)
        if limit and limit <= self.lead_seconds:
            raise ValueError(
                f"launch.time={self.time} is {limit} s, of which launch.lead_seconds={self.lead_seconds} are for "
                "saving and leaving; raise the one or lower the other"
            )
        return self


def limit_seconds(time: str) -> int:
    """SLURM's time limit in seconds: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; empty: 0."""
    if not time:
        return 0
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts]}.get(len(parts), parts)
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class SweepConfig(Section):
    method: Literal["grid", "random", "tpe"] = "grid"
    """`grid`: every combination of values; `random` and `tpe` (Optuna) draw `sweep.trials` combinations, also from
    intervals."""
    trials: int = Field(20, ge=1)
    """Number of runs of a search, counting those of earlier calls in the same folder."""
    metric: str = "val/loss"
    """Metric that a search compares: its last value in a run (docs/metrics.md)."""
    goal: Literal["minimize", "maximize"] = "minimize"
    """Whether lower or higher values of `sweep.metric` are better."""
    seed: int = Field(0, ge=0)
    """Seed of a search; run n depends on it, on n and on the results so far."""
    at_once: int = Field(1, ge=1)
    """Runs at the same time on this machine, which divide its GPUs among them."""
