"""The examination of one node, without the others."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sora_train.config import Config
from sora_train.config.job import digest
from sora_train.errors import ConfigError
from sora_train.tools.doctor.checks import environment, gpus, limits, network, storage, versions
from sora_train.tools.doctor.findings import FAIL, Finding, info
from sora_train.tools.doctor.nodes.deadline import LateError, all_checked, apart, within

CHECKS = "sora_train.tools.doctor.checks"
PORT = 29500
SHAPES = "shapes"
"""The built-in source of clips, which is rendered."""
DNS = 8.0
FILES = 15.0


@dataclass(frozen=True)
class RankPlace:
    """This rank's place in the job, from the environment that torchrun sets."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    ranks: int = 1
    """Of this node."""
    name: str = "this machine"
    """What the node is called in the tables."""

    @classmethod
    def read(cls, name: str) -> "RankPlace":
        rank, size = int_variable("RANK", 0), int_variable("WORLD_SIZE", 1)
        local_rank, ranks = int_variable("LOCAL_RANK", 0), int_variable("LOCAL_WORLD_SIZE", 1)
        return cls(rank, size, local_rank, ranks, name)

    @property
    def nodes(self) -> int:
        return -(-self.size // self.ranks)

    @property
    def node(self) -> int:
        return self.rank // self.ranks

    @property
    def examines(self) -> bool:
        """Whether this rank examines its node."""
        return self.local_rank == 0


def int_variable(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


@dataclass(frozen=True)
class PlannedRun:
    """What is to be trained, None where no run is named; or why its configuration is refused."""

    cfg: Config | None = None
    error: str = ""

    @property
    def folder(self) -> Path:
        """The run folder; without a run the working directory stands for it."""
        return Path(self.cfg.run.dir if self.cfg else ".").absolute()

    @property
    def digest(self) -> str:
        import yaml

        if self.cfg is None:
            return "refused" if self.error else ""
        return digest(yaml.safe_dump(self.cfg.model_dump(mode="json"), sort_keys=False))

    @property
    def sources(self) -> list[str]:
        """Where the clips lie; rendered clips lie nowhere."""
        if self.cfg is None:
            return []
        data = self.cfg.data
        places = [data.source] if data.source else [source.source for source in data.sources]
        return [place for place in places if place.partition(":")[0] != SHAPES]


def examine(place: RankPlace, run: PlannedRun) -> tuple[list[Finding], dict[str, str]]:
    """The findings of this node, and its versions."""
    master = os.environ.get("MASTER_ADDR", "") if place.size > 1 else ""
    late = "its name server does not answer: look at /etc/resolv.conf, or give addresses instead of names"
    try:
        net = within(DNS, partial(network.read, master))
        named = "GLOO_SOCKET_IFNAME" in os.environ
        lines = network.judge(net, nodes=place.nodes, interface_named=named)
    except LateError:
        net = network.Network("?", (), network.read_interfaces(), network.read_infiniband())
        lines = [Finding("names", f"no answer within {DNS:g} s", FAIL, late)]
    held: dict[str, str] = {"mtu": str(net.chosen.mtu)} if net.chosen else {}
    disk = "the file system does not answer: df and ls by hand, dmesg, and have the node drained"
    driver = "the driver hangs: dmesg, and have the node drained"
    cores = min(len(os.sched_getaffinity(0)), os.cpu_count() or 1)
    lines += all_checked(
        [
            ("job", 5, partial(_job, place, run, net), late),
            ("meeting port", 10, partial(_port, place, run), late),
            ("versions", FILES, partial(_versions, run, held), disk),
            ("GPUs", 2 * gpus.SECONDS + 2, partial(_gpus, place, run, held), driver),
            ("limits", 5, partial(_limits, place, run, net), disk),
            ("environment", 5, partial(_environment, place, net, cores), disk),
            ("run folder", FILES, partial(_folder, run), disk),
            ("data", FILES, partial(_data, run), disk),
        ]
    )
    return lines, held


def _job(place: RankPlace, run: PlannedRun, net: network.Network) -> list[Finding]:
    findings = environment.judge_job(os.environ, owns_master=net.owns_master)
    if run.error:
        remedy = "mend the command line or the files it names, on every node"
        return [*findings, Finding("configuration", run.error, FAIL, remedy)]
    if run.cfg is None:
        hint = "no run is named: sora doctor experiment=... sees more"
        return [*findings, info("configuration", hint)]
    from sora_train.parallel.degrees import check_degrees, resolve_degrees

    world = place.size if place.size > 1 else max(1, run.cfg.launch.ranks) * run.cfg.launch.nodes
    try:
        degrees = resolve_degrees(run.cfg.parallel, world)
        check_degrees(run.cfg, degrees)
    except ConfigError as error:
        remedy = "change parallel.* or the number of ranks"
        return [*findings, Finding("layout", f"{world} rank(s): {error}", FAIL, remedy)]
    return [*findings, Finding("layout", f"{world} rank(s): {degrees}")]


def _port(place: RankPlace, run: PlannedRun) -> list[Finding]:
    configured = run.cfg.launch.port if run.cfg else 0
    port = int_variable("MASTER_PORT", configured or PORT)
    address = os.environ.get("MASTER_ADDR", "")
    return network.meeting_port(address, port, under_launcher=place.size > 1, seconds=5)


def _versions(run: PlannedRun, held: dict[str, str]) -> list[Finding]:
    values = apart(f"{CHECKS}.versions:read", None, FILES - 1)
    values |= versions.of_torch()
    if run.digest:
        values |= {"config": run.digest, "run.dir": str(run.folder)}
    held.update(values)
    return versions.judge(values)


def _gpus(place: RankPlace, run: PlannedRun, held: dict[str, str]) -> list[Finding]:
    output = apart(f"{CHECKS}.gpus:read", None, 2 * gpus.SECONDS)
    required = run.cfg is not None and run.cfg.run.device == "cuda"
    held.update(gpus.compared(output))
    kernel_files = any(Path("/dev").glob("nvidia[0-9]*"))
    ranks = 1 if run.cfg is not None and run.cfg.run.device == "cpu" else place.ranks
    return gpus.judge(output, ranks=ranks, required=required, kernel_files=kernel_files)


def _limits(place: RankPlace, run: PlannedRun, net: network.Network) -> list[Finding]:
    workers = run.cfg.data.num_workers if run.cfg else 0
    return limits.judge(
        limits.read(), ranks=place.ranks, workers=workers, infiniband=bool(net.infiniband)
    )


def _environment(place: RankPlace, net: network.Network, cores: int) -> list[Finding]:
    names = [interface.name for interface in net.interfaces]
    return environment.judge(os.environ, interfaces=names, cores=cores, ranks=place.ranks)


def _folder(run: PlannedRun) -> list[Finding]:
    name = "run.dir" if run.cfg else "working folder"
    argument = {"folder": str(run.folder), "write": True}
    facts = apart(f"{CHECKS}.storage:measure", argument, FILES - 1)
    return storage.judge_folder(name, facts, needed=checkpoint_bytes(run.cfg) if run.cfg else 0.0)


def checkpoint_bytes(cfg: Config) -> float:
    """Bytes of all checkpoints kept at once: the transformer's weights, moments and averages in float32."""
    from sora_train.models.memory import moment_copies, transformer_parameters

    if cfg.task != "text_to_video":
        return 0.0
    moments = moment_copies(cfg.optim, cfg.model, cfg.text)
    one = transformer_parameters(cfg.model)[0] * 4.0 * (2 + moments + len(cfg.ema.more))
    return one * (cfg.checkpoint.keep_last + cfg.checkpoint.keep_best + 1)


def _data(run: PlannedRun) -> list[Finding]:
    findings: list[Finding] = storage.judge_caches(dict(os.environ))
    sources = run.sources
    if not sources:
        return findings
    problems = apart(f"{CHECKS}.storage:source_reached", {"sources": sources}, FILES - 1)
    return [*findings, *storage.judge_sources(sources, problems)]
