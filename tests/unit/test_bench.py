"""Benchmarks: the statistics are right, and no number goes without its machine, commit and command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import train as bench_train
from sora_train import cli
from sora_train.errors import ConfigError, UserError
from sora_train.monitoring.device_peaks import peak_flops
from sora_train.tools import measuring as harness
from sora_train.tools.measuring import Measured, Result, Stats, measure

REPO = Path(__file__).parents[2]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_statistics_are_those_of_numpy(values: list[float]):
    stats = Stats.of(values)
    expected = np.quantile(values, [0.1, 0.5, 0.9])
    np.testing.assert_allclose([stats.p10, stats.median, stats.p90], expected, atol=1e-6)
    assert stats.n == len(values)


def test_no_measurement_is_no_result():
    with pytest.raises(ValueError, match="no measurement"):
        Stats.of([])


def test_warm_up_is_called_and_not_counted(monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    costs = iter([100.0, 50.0, 1.0, 2.0, 3.0])

    def work() -> None:
        nonlocal now
        now += next(costs)

    monkeypatch.setattr(harness.time, "perf_counter", lambda: now)
    stats = measure(work, warmup=2, repeats=3)
    assert (stats.median, stats.n) == (2.0, 3)
    assert next(costs, None) is None


def test_a_result_carries_machine_commit_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["sora", "bench", "toy"])
    result = Result(
        "toy", {"step": Measured(Stats.of([1.0, 2.0, 3.0]), "s")}, {"batch": 4, "peak": None}
    )
    path = result.write(tmp_path / "deep")
    read = json.loads(path.read_text())
    assert read["measured"]["step"] == {"median": 2.0, "p10": 1.2, "p90": 2.8, "n": 3, "unit": "s"}
    assert read["machine"]["torch"] == torch.__version__ and read["machine"]["cpu"]
    assert read["machine"]["cores"] >= 1
    assert read["commit"] and read["command"].startswith("sora ")
    page = path.with_suffix(".md").read_text()
    assert "| step | 2 | 1.2 | 2.8 | s | 3 |" in page
    assert read["commit"] in page and read["machine"]["cpu"] in page and read["command"] in page
    assert sorted(file.name for file in path.parent.iterdir()) == ["toy.json", "toy.md"]


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 3060", None),
    ],
)
def test_peaks_are_known_by_name(device: str, peak: float | None):
    assert peak_flops(device) == peak


@pytest.mark.parametrize(("steps", "warmup"), [(0, 1), (1, -1)])
def test_nothing_to_measure_is_refused(steps: int, warmup: int, tmp_path: Path):
    with pytest.raises(UserError, match="--steps"):
        bench_train.run([], steps=steps, warmup=warmup, out=tmp_path)


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        bench_train.run([], steps=1, warmup=0, out=tmp_path)


def test_a_wrong_override_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="optim.lrr"):
        bench_train.run(["optim.lrr=1"], steps=1, warmup=0, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_toy_training_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["data.shapes_clips=8", "--steps", "3", "--warmup", "1", "--out", str(tmp_path)]
    assert bench_train.main(["run.device=cpu", *arguments]) == 0
    found = json.loads((tmp_path / "train.json").read_text())
    measured = found["measured"]
    assert set(measured) == {"step time", "throughput", "data wait"}, "no peak, so no MFU"
    assert all(value["n"] == 3 for value in measured.values())
    assert measured["step time"]["median"] > 0 and measured["throughput"]["median"] > 0
    assert 0 <= measured["data wait"]["median"] <= 100
    assert found["facts"]["steps before measuring"] == 1 and found["facts"]["device"] == "cpu"
    assert "| step time |" in capsys.readouterr().out


def test_the_parts_of_the_gpu_suite_fit_into_ten_minutes():
    suite = (REPO / "benchmarks/gpu_suite.sh").read_text()
    limits = [int(seconds) for seconds in re.findall(r"^part \w+ (\d+) ", suite, re.M)]
    assert len(limits) == 4 and sum(limits) < 600


@pytest.mark.slow
def test_the_gpu_suite_runs_at_toy_size_on_a_cpu(tmp_path: Path):
    suite = REPO / "benchmarks/gpu_suite.sh"
    environment = {
        **os.environ,
        "SORA_TOY": "1",
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", str(suite), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "suite.md").read_text().count("| passed |") == 4
    assert (tmp_path / "train_256px/train.json").exists()
    assert json.loads((tmp_path / "quickstart/summary.json").read_text())["steps"] == 2


def test_a_part_that_fails_stops_no_other(tmp_path: Path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$*" in *bench*) echo broken; exit 3;; esac\n')
    fake.chmod(0o755)
    environment = {**os.environ, "SORA_TOY": "1", "PYTHON": str(fake)}
    command = ["bash", str(REPO / "benchmarks/gpu_suite.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    table = (tmp_path / "out/suite.md").read_text()
    assert done.returncode == 1
    assert "| train_256px | failed with exit code 3 |" in table
    assert table.count("| passed |") == 2
    assert (tmp_path / "out/train_256px.log").read_text() == "broken\n"


def sora(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sora_train", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_benchmarks_of_the_checkout_run_from_any_folder(tmp_path: Path):
    # A package of the same name in the folder where the command is given is not taken.
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise SystemExit(9)")
    assert "  vae " in sora(["bench", "--help"], tmp_path).stdout
    wrong = sora(["bench", "data", "--clips", "0"], tmp_path)
    assert wrong.returncode == 2 and "--clips 0" in wrong.stderr
    unknown = sora(["bench", "nothing"], tmp_path)
    assert unknown.returncode == 2 and "sora bench --help" in unknown.stderr


def test_without_a_checkout_it_says_where_the_benchmarks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cli, "REPOSITORY", tmp_path)
    with pytest.raises(UserError, match=r"sora bench data.*repository"):
        cli.run(["bench", "data", "experiment=quickstart"])
    # What a run is told by data.cost_a can be measured without one.
    with pytest.raises(UserError, match="tokens"):
        cli.run(["bench", "cost", "tokens=1,2"])
