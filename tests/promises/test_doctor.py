"""`sora doctor` on several nodes, each a process here: who differs is named, and who is frozen; nobody hangs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sora_train.tools.doctor.checks.network import address_towards

SECONDS = 45
"""What the doctor is given; a process that is frozen costs some waits of it."""


def own_address() -> str:
    """Not a loopback one where there is another."""
    return address_towards("192.0.2.1") or "127.0.0.1"


class Nodes:
    """Ranks of one job, each of which takes itself for a node."""

    def __init__(self, count: int, folder: Path, *options: str):
        self.count, self.folder, self.options = count, folder, options
        with socket.create_server(("", 0)) as server:
            self.port = server.getsockname()[1]
        self.processes: dict[int, subprocess.Popen] = {}

    def start(self, rank: int, *arguments: str) -> None:
        job = {
            "RANK": rank,
            "GROUP_RANK": rank,
            "WORLD_SIZE": self.count,
            "LOCAL_RANK": 0,
            "LOCAL_WORLD_SIZE": 1,
            "MASTER_ADDR": own_address(),
            "MASTER_PORT": self.port,
            "OMP_NUM_THREADS": 1,
            "COLUMNS": 100,
        }
        environ = os.environ | {name: str(value) for name, value in job.items()}
        command = [
            sys.executable,
            "-m",
            "sora_train",
            "doctor",
            "--name",
            f"n{rank}",
            "--seconds",
            str(SECONDS),
            *self.options,
            *arguments,
            "experiment=parity_tiny",
        ]
        with (self.folder / f"out-{rank}").open("w") as out:
            self.processes[rank] = subprocess.Popen(command, stdout=out, stderr=out, env=environ)

    def code(self, rank: int) -> int:
        return self.processes[rank].wait(timeout=300)

    def said(self, rank: int) -> str:
        return (self.folder / f"out-{rank}").read_text()

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


def findings(told: dict, node: str) -> dict[str, dict]:
    found = next(one["findings"] for one in told["nodes"] if one["node"] == node)
    return {one["name"]: one for one in found}


def test_two_nodes_that_are_well_examine_each_other(tmp_path: Path):
    report, run_dir = tmp_path / "report.json", tmp_path / "run"
    with Nodes(2, tmp_path, "--json", str(report)) as nodes:
        for rank in (1, 0):
            nodes.start(rank, f"run.dir={run_dir}")
        assert [nodes.code(rank) for rank in (0, 1)] == [0, 0], nodes.said(0) + nodes.said(1)
        assert nodes.said(1) == ""
        assert "n1" in nodes.said(0)
    told = json.loads(report.read_text())
    assert told["verdict"] in ("ok", "warn") and told["seconds"] < SECONDS
    own = findings(told, "n1")
    for name in (
        "other nodes",
        "clock",
        "run.dir, shared",
        "run.dir, shared: renaming",
        "meeting port",
        "layout",
    ):
        assert own[name]["verdict"] == "ok", own[name]
    between = {one["name"]: one for one in told["between"]}
    assert between["nodes"]["verdict"] == "ok"
    for name in ("all-reduce of 1 MiB", "all-to-all of 1 MiB", "neighbours"):
        assert "GB/s" in between[name]["value"]
    assert not list(tmp_path.glob("**/.sora-doctor*"))


@pytest.mark.slow
def test_a_frozen_node_and_one_with_another_configuration_are_named(tmp_path: Path):
    report = tmp_path / "report.json"
    with Nodes(3, tmp_path, "--json", str(report), "--no-bandwidth") as nodes:
        for rank in (2, 1, 0):
            seed = "seed=7" if rank == 1 else "seed=0"
            nodes.start(rank, seed, f"run.dir={tmp_path / ('own' if rank == 2 else 'run')}")
        (tmp_path / "own").mkdir()
        freeze_when_it_measures(nodes.processes[2], tmp_path / "own")
        began = time.monotonic()
        assert [nodes.code(rank) for rank in (0, 1)] == [1, 1], nodes.said(0) + nodes.said(1)
        assert time.monotonic() - began < SECONDS + 30
    told = json.loads(report.read_text())
    assert told["verdict"] == "fail" and told["seconds"] < SECONDS
    gone = findings(told, "n2")["examination"]
    assert gone["verdict"] == "fail" and "not answered" in gone["value"] and gone["remedy"]
    assert findings(told, "n1")["to n2"]["verdict"] == "fail"
    # The others still report.
    assert findings(told, "n1")["open files"] and findings(told, "n0")["run.dir: writing"]
    differ = next(one for one in told["between"] if one["name"] == "config")
    assert differ["verdict"] == "fail" and "n1 has" in differ["value"]


def freeze_when_it_measures(process: subprocess.Popen, folder: Path) -> None:
    """The file whose speed is measured says that the node is among the others, and amid its examination."""
    ends = time.monotonic() + 200
    while not list(folder.glob(".sora-doctor-speed*")):
        assert process.poll() is None and time.monotonic() < ends
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGSTOP)


@pytest.mark.slow
def test_a_node_that_never_comes_is_named_and_a_refused_configuration(tmp_path: Path):
    report = tmp_path / "report.json"
    with Nodes(3, tmp_path, "--json", str(report)) as nodes:
        nodes.start(1, "sed=7")
        nodes.start(0)
        assert [nodes.code(rank) for rank in (0, 1)] == [1, 1]
    told = json.loads(report.read_text())
    between = {one["name"]: one for one in told["between"]}
    assert (
        "rank(s) 2" in between["node 2"]["value"]
        and "not measured" in between["bandwidth"]["value"]
    )
    assert "sed" in findings(told, "n1")["configuration"]["value"]


@pytest.mark.slow
def test_a_lost_first_rank_is_told_by_the_others(tmp_path: Path):
    with Nodes(2, tmp_path, "--no-bandwidth") as nodes:
        for rank in (1, 0):
            nodes.start(rank, f"run.dir={tmp_path / str(rank)}")
        (tmp_path / "0").mkdir()
        freeze_when_it_measures(nodes.processes[0], tmp_path / "0")
        assert nodes.code(1) == 1
        assert "rank 0" in nodes.said(1)


@pytest.mark.slow
def test_under_torchrun_one_command_examines_all_ranks(tmp_path: Path):
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "sora_train",
            "doctor",
            "--json",
            str(report),
            "experiment=parity_tiny",
            f"run.dir={tmp_path / 'run'}",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(report.read_text())
    assert len(told["nodes"]) == 1
    assert "all-reduce of 1 MiB" in {one["name"] for one in told["between"]}
