"""A real SLURM with two nodes: a job that is told to leave, runs out of time or loses a node ends with the weights of
one that was left alone.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cluster import Cluster, missing, until

from benchmarks.footage import Shot, footage, write_footage
from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.tensors import StoredTensors
from sora_train.monitoring.metrics import is_clocked, read_metrics

REPO = Path(__file__).resolve().parents[3]
RUN = ["experiment=parity_tiny", "validation.every=0", "checkpoint.every=10"]
JOB = ["launch.nodes=2", "launch.ranks=1", "launch.gpus=0", f"launch.python={sys.executable}"]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
START = 120.0
"""Seconds from submission to the first step, and from a requeue to the next one: 60 on an idle machine, and twice that
beside other tests."""
SLOW = """
import time

from sora_train.config import Config
from sora_train.train import main
from sora_train.training.trainer import Trainer


class Slow(Trainer):
    def callbacks(self):
        return [*super().callbacks(), lambda trainer, row: time.sleep(0.4)]


if __name__ == "__main__":
    main(Slow, Config)
"""
"""A project's own file, whose steps take long enough to be disturbed on any machine; its numbers are the same."""
pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "SLURM is here")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    found = Cluster(tmp_path_factory.mktemp("slurm"))
    found.env |= {
        "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{found.env['PATH']}",
    }  # fmt: skip
    with found:
        yield found
    until(lambda: not found.processes(), 20, "end of all that the cluster has started")


def launch(
    cluster: Cluster, folder: Path, *overrides: str, code: int = 0, script: tuple[str, ...] = ()
) -> str:
    """`sora launch slurm`; returns the job's id, or what was said where it ends with another code."""
    command = [
        sys.executable,
        "-m",
        "sora_train",
        "launch",
        "slurm",
        *script,
        *RUN,
        *JOB,
        *overrides,
    ]
    done = subprocess.run(
        command, cwd=folder, env=cluster.env, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, (done.stdout, done.stderr)
    return re.search(r"(?:job|array) (\d+)", done.stdout)[1] if code == 0 else done.stderr


def step_of(run_dir: Path) -> int:
    """The newest row of metrics."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def reached(run_dir: Path, step: int, seconds: float = 120) -> float:
    return until(lambda: step_of(run_dir) >= step, seconds, f"step {step}")


def ended(cluster: Cluster, job: str, seconds: float = 240) -> str:
    """The state in which the job ends."""
    until(lambda: cluster.state(job) in OVER, seconds, f"end of job {job}")
    return cluster.state(job)


def until_out(cluster: Cluster, job: str, *command: str) -> float:
    """Seconds until the job, by this command, does not run any more."""
    cluster.run(*command)
    return until(lambda: cluster.state(job) != "RUNNING", 90, f"end after {command}")


def disturbed(cluster: Cluster, job: str, run_dir: Path, steps: int, *command: str) -> float:
    """Seconds from this command to so many steps beyond where it left the job."""
    left = until_out(cluster, job, *command)
    # What it wrote while it was leaving is not counted.
    queued = until(lambda: cluster.state(job) == "RUNNING", 60, "start from the queue")
    return left + queued + reached(run_dir, step_of(run_dir) + steps)


def logs(folder: Path) -> str:
    return "\n".join(file.read_text()[-4000:] for file in folder.rglob("slurm-*.out"))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    stored = StoredTensors(checkpoints.find(run_dir))
    checkpoints.verify(stored.checkpoint)
    return stored.read(*stored.shapes)


def rows(run_dir: Path) -> list[dict[str, float]]:
    found = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not is_clocked(key)} for row in found]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_that_is_requeued_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    began = time.monotonic()
    quick = ["train.steps=20", "parallel.self_test=false", "data.shapes_clips=8"]
    job = launch(cluster, tmp_path, "run.dir=run", *quick)
    reached(run_dir, 1)
    first = time.monotonic() - began
    second = disturbed(cluster, job, run_dir, 1, "scontrol", "requeue", job)
    assert ended(cluster, job) == "COMPLETED", logs(run_dir)
    print(f"submit to the first step: {first:.1f} s; requeue to the next step: {second:.1f} s")
    assert max(first, second) < START
    assert [row["step"] for row in rows(run_dir)] == list(range(1, 21))
    assert checkpoints.find(run_dir).step == 20
    said = {path.parent.name for path in run_dir.glob(f"launch/logs/{job}-*/node-*")}
    assert said == {f"{job}-0", f"{job}-1"}, "each start has logs of its own"


@pytest.mark.timeout(120)
def test_what_slurm_would_refuse_is_told_in_a_sentence(cluster: Cluster, tmp_path: Path) -> None:
    for override, sentence in (
        ("launch.partition=gpus", "launch.partition"),
        ("launch.nodes=5", "launch.nodes"),
        ("launch.memory=9000G", "launch.memory"),
    ):
        told = launch(cluster, tmp_path, f"run.dir={tmp_path}/run", override, code=2)
        assert told.startswith("error: SLURM refuses the job: ") and sentence in told
        assert told.count("\n") == 1
    assert cluster.run("squeue", "-h") == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_disturbed_job_ends_with_the_same_weights(cluster: Cluster, tmp_path: Path) -> None:
    """The undisturbed one is submitted by the plain file, so the two ways to start a job are the same too."""
    straight, run_dir, steps = tmp_path / "straight", tmp_path / "disturbed", "train.steps=80"
    plain = ["sbatch", "--parsable", "--nodes=2", str(REPO / "launch/slurm.sbatch")]
    job = cluster.run(*plain, *RUN, steps, f"run.dir={straight}", cwd=tmp_path)
    assert ended(cluster, job) == "COMPLETED", logs(tmp_path)

    (tmp_path / "slow.py").write_text(SLOW)
    job = launch(cluster, tmp_path, f"run.dir={run_dir}", steps, script=("slow.py",))
    times = []

    def disturb(*command: str) -> None:
        times.append(disturbed(cluster, job, run_dir, 8, *command))

    reached(run_dir, 8)
    disturb("scancel", "--signal=USR1", job)
    disturb("scontrol", "requeue", job)
    # Less than the lead before the limit, so it is told to leave.
    left = until_out(cluster, job, "scontrol", "update", f"JobId={job}", "TimeLimit=4")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    times.append(left + reached(run_dir, step_of(run_dir) + 8))
    cluster.kill_node("n2")
    until(lambda: cluster.state(job) != "RUNNING", 90, "notice of the dead node")
    cluster.start_node("n2")
    assert ended(cluster, job) == "COMPLETED", logs(run_dir)
    assert "Restarts=4" in cluster.run("scontrol", "show", "job", job)

    print(f"disturbed to 8 steps later: {', '.join(f'{seconds:.0f}' for seconds in times)} s")
    assert rows(run_dir) == rows(straight)
    expected, found = weights(straight), weights(run_dir)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_edited_configuration_is_refused_by_every_rank(cluster: Cluster, tmp_path: Path) -> None:
    job = launch(cluster, tmp_path, "run.dir=run", "launch.options=[--hold]")
    (frozen,) = (tmp_path / "run/launch").glob("config-*.yaml")
    frozen.write_text(frozen.read_text().replace("steps: 6", "steps: 7"))
    cluster.run("scontrol", "release", job)
    assert ended(cluster, job) == "FAILED"
    assert "ExitCode=1:0" in cluster.run("scontrol", "show", "job", job)
    said = [path.read_text() for path in (tmp_path / "run/launch/logs").rglob("stderr.log")]
    assert len(said) == 2 and all("it was edited" in text for text in said)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_each_task_of_an_array_runs_its_line(cluster: Cluster, tmp_path: Path) -> None:
    lines = [f"sh -c 'echo \"$0\" > {tmp_path}/{n}; exit {n}' 'line {n}'" for n in (0, 3)]
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n")
    plain = ["sbatch", "--parsable", "--array=1-3", str(REPO / "launch/slurm_array.sbatch")]
    job = cluster.run(*plain, "lines.txt", cwd=tmp_path)
    states = [ended(cluster, f"{job}_{task}", 60) for task in (1, 2, 3)]
    assert states == ["COMPLETED", "FAILED", "FAILED"]
    assert [(tmp_path / name).read_text() for name in ("0", "3")] == ["line 0\n", "line 3\n"]
    assert "has no line 3" in (tmp_path / f"slurm-{job}_3.out").read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sweep_is_an_array(cluster: Cluster, tmp_path: Path) -> None:
    """The task that is killed is the only one that a second call submits; a run is what it is by itself."""
    keys = ["-m", "seed=0,1", "launch.nodes=1", "launch.array_limit=1", "run.dir=swept"]
    array = launch(cluster, tmp_path, *keys)
    until(lambda: cluster.state(f"{array}_1") == "RUNNING", 120, "second task")
    cluster.run("scancel", f"{array}_1")
    states = [ended(cluster, f"{array}_{task}") for task in (0, 1)]
    assert states == ["COMPLETED", "CANCELLED"]
    again = launch(cluster, tmp_path, *keys)
    assert ended(cluster, f"{again}_0") == "COMPLETED", logs(tmp_path)
    assert cluster.run("squeue", "-h") == ""
    alone = launch(cluster, tmp_path, "seed=1", "launch.nodes=1", "run.dir=alone")
    assert ended(cluster, alone) == "COMPLETED", logs(tmp_path)
    assert rows(tmp_path / "swept/seed=1") == rows(tmp_path / "alone")
    assert rows(tmp_path / "swept/seed=0") != rows(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_array_prepares_footage_as_one_process_does(cluster: Cluster, tmp_path: Path) -> None:
    from data_prep.command import prepare

    (tmp_path / "films").mkdir()
    for number in range(3):
        shots = [Shot(seed=10 * number + n, seconds=1.0, camera="pan_right") for n in range(2)]
        film = footage(shots, height=72, width=128, fps=12)
        write_footage(film, tmp_path / f"films/{number}.mp4")
    settings = [
        f"input={tmp_path}/films", "workers=1", "sample=0", "scenes.detector=difference", "cut.min_seconds=0.5",
        "score.text=false", "score.faces=false", "score.nsfw=false", "score.brisque=false", "caption.by=template",
        "caption.template={camera} shot",
    ]  # fmt: skip
    out = tmp_path / "array/out"
    told = cluster.run(
        str(REPO / "launch/prep_array.sh"), "2", *settings, f"output={out}", cwd=tmp_path
    )
    assert ended(cluster, told.split()[-1], 500) == "COMPLETED", logs(tmp_path)
    prepare([*settings, f"output={tmp_path}/here/out"])
    for name in ("manifest.parquet", "shard-000000.tar"):
        assert (out / name).read_bytes() == (tmp_path / "here/out" / name).read_bytes()
