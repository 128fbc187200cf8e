"""What every launcher needs to know of a job: its nodes, and the command of each."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from sora_train.config.job import FOLDER
from sora_train.config.sections.launch import LaunchConfig
from sora_train.errors import ConfigError

LOGS = "logs"


@dataclass(frozen=True)
class Job:
    """Paths are absolute: nodes may start elsewhere."""

    name: str
    run_dir: Path
    frozen: Path
    """The configuration, as `sora_train.config.job` has written it."""
    working_dir: Path
    cfg: LaunchConfig
    ranks: int
    """Of each node."""
    script: tuple[str, ...] = ("-m", "sora_train.train")
    """What torchrun starts: a module, or a training file of one's own."""

    @property
    def logs(self) -> Path:
        return self.run_dir / FOLDER / LOGS

    def node_command(
        self, *, node: str, address: str, port: str, logs: str, python: str = "", frozen: str = ""
    ) -> str:
        """The shell command of one node. What is given are words of a shell, quoted already: `"$SLURM_NODEID"`.

        `frozen` stands for the configuration's path where it is known on the node only.
        """
        meeting = ["--standalone"]
        if self.cfg.nodes > 1 or self.cfg.port:
            meeting = ["--nnodes", str(self.cfg.nodes), "--node-rank", node,
                       "--master-addr", address, "--master-port", port]  # fmt: skip
        words = [
            shlex.quote(python or self.cfg.python), "-m", "sora_train.tools.launch.node", *meeting,
            "--nproc-per-node", str(self.ranks), "--log-dir", logs, "--redirects", "3", "--tee", "0:3",
            *map(shlex.quote, self.script), "--frozen", frozen or shlex.quote(str(self.frozen)),
        ]  # fmt: skip
        return " ".join(words)

    def environment(self) -> dict[str, str]:
        """Variables of the ranks; those of `launch.env` win."""
        variables = {"PYTHONUNBUFFERED": "1"}
        if self.cfg.offline:
            variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        if self.cfg.interface:
            variables |= {
                "NCCL_SOCKET_IFNAME": self.cfg.interface,
                "GLOO_SOCKET_IFNAME": self.cfg.interface,
            }
        return variables | self.cfg.env


def exports(variables: dict[str, str]) -> list[str]:
    """Shell lines."""
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def one_line(key: str, value: str) -> str:
    """`value`, which stands on a line of its own. Raises ConfigError where it has several."""
    if "\n" in value:
        raise ConfigError(f"launch.{key} has several lines, and a scheduler reads one: {value!r}")
    return value
