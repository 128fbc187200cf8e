"""How a job is started on one machine or on many; nothing that is trained depends on it."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sora_train.config.sections.base import Section
from sora_train.config.sections.data import StrList


class LaunchConfig(Section):
    nodes: int = Field(1, ge=1)
    """Nodes of the job."""
    ranks: int = Field(0, ge=0)
    """Processes of each node, one a GPU; 0: the GPUs of this machine, one process where it has none."""
    gpus: int = Field(-1, ge=-1)
    """GPUs asked of each node; -1: as many as `launch.ranks`; 0: none, for a cluster of CPUs."""
    cpus: int = Field(0, ge=0)
    """CPU cores asked of each node; 0: as the scheduler has it."""
    memory: str = ""
    """Memory asked of each node, as the scheduler writes it (`900G`, `0` for all); empty: as the scheduler has it."""
    time: str = ""
    """Time limit of a job, as SLURM writes it (`24:00:00`, `2-00:00:00`); it goes on in the next. Empty: the
    partition's."""
    lead_seconds: int = Field(300, ge=0)
    """How long before the limit ranks are told to save and leave; more than a checkpoint takes."""
    partition: str = ""
    """SLURM's partition; empty: its default."""
    account: str = ""
    """SLURM's account that is charged; empty: your default."""
    qos: str = ""
    """SLURM's quality of service; empty: your default."""
    constraint: str = ""
    """Features that nodes must have, as SLURM writes them: `h100&ib`."""
    exclude: str = ""
    """Nodes that are not to be used, as SLURM writes them: `gpu[03,07]`."""
    port: int = Field(0, ge=0, le=65535)
    """Port at which ranks meet; 0: one made of the job's id, a free one on a single machine."""
    interface: str = ""
    """Network interface of NCCL and gloo (`ib0`, `eth0`); empty: what they find."""
    container: str = ""
    """Image in which ranks run: a SquashFS file or `registry#image:tag`; empty: none."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """What starts containers on the nodes."""
    mounts: StrList = ()
    """`HOST:INSIDE` of folders that the container sees; the run folder and the working directory are among them."""
    setup: StrList = ()
    """Shell lines before the ranks of a node start: `module load cuda`, `source .venv/bin/activate`."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the ranks."""
    python: str = "python"
    """The interpreter on the nodes."""
    array_limit: int = Field(0, ge=0)
    """Runs of a sweep (`sora launch slurm -m`) that SLURM lets run at the same time; 0: as many as it can."""
    options: StrList = ()
    """Further lines for the scheduler, as it writes them: `--reservation=mine`."""
    offline: bool = True
    """Refuse to fetch weights from a hub in the job; `sora fetch` brings them beforehand."""
    image: str = ""
    """Kubernetes: the image of the ranks."""
    namespace: str = ""
    """Kubernetes: the namespace; empty: kubectl's own."""
    claim: str = ""
    """Kubernetes: the volume claim that holds the working directory, run folders and clips; mounted at `mount`."""
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
