"""Benchmarks: the statistics are right, and no number goes without its machine, commit and command."""

import itertools
import json
import os
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import ckpt as bench_ckpt
from benchmarks import memory as bench_memory
from benchmarks import model as bench_model
from benchmarks import train as bench_train
from benchmarks import vae as bench_vae
from benchmarks.stub_attention import stubbed
from sora_train import cli
from sora_train.checkpoint.saver import Saver
from sora_train.config.compose import compose
from sora_train.data.sample import Clip
from sora_train.device import measuring as harness
from sora_train.device.measuring import Measured, Result, Stats, measure
from sora_train.errors import ConfigError, UserError
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.monitoring.device_peaks import peak_flops

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


def test_training_is_measured_without_a_rehearsal_or_a_last_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    saved = []
    monkeypatch.setattr(Saver, "save", lambda self, *given: saved.append(given))
    monkeypatch.setattr(Saver, "rehearse", lambda self, *given: saved.append(given))
    bench_train.run(["run.device=cpu", "data.shapes_clips=8"], steps=1, warmup=0, out=tmp_path)
    assert not saved


class Clock:
    """What happened, in its order: readings of the clock, and waits for the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: ModuleType):
        self.events: list[str] = []
        real = time.perf_counter

        def read() -> float:
            self.events.append("read")
            return real()

        monkeypatch.setattr(module.time, "perf_counter", read)
        monkeypatch.setattr(harness, "synchronize", lambda: self.events.append("wait"))

    def waits_before_every_reading(self) -> bool:
        pairs = itertools.pairwise(["", *self.events])
        return "read" in self.events and all(
            before == "wait" for before, event in pairs if event == "read"
        )


def test_encoding_and_decoding_are_over_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch):
    vae = VideoVAE.from_config(compose(["vae=tiny_random"]).config.vae)
    clip = Clip(0, 0, np.zeros((5, 16, 16, 3), np.uint8), None, 8.0, "", "")
    clock = Clock(monkeypatch, bench_vae)
    bench_vae.measure(vae, [clip])
    assert clock.waits_before_every_reading()


def test_a_save_is_over_on_the_device_before_the_clock_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    clock = Clock(monkeypatch, bench_ckpt)
    bench_ckpt.run(mib=8, repeats=1, device="cpu", folder=tmp_path, out=tmp_path)
    # Others read the same clock: the savers' own threads do.
    waits = clock.events.count("wait")
    assert waits >= 2 + 4 * 2 + 2


def memory_request(**sizes: object) -> bench_memory.Wanted:
    model = bench_model.model_of(["model.num_layers=2", "model.num_heads=2"])
    request = bench_model.ModelBenchRequest(model, tokens=64, caption=16, repeats=1, device="cpu")
    given = {"options": ("nothing", "full"), "longest": False, "budget": 0.0, **sizes}
    return bench_memory.Wanted(request, torch.float32, **given)


def test_an_option_is_on_disk_before_the_next_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measure_option = bench_memory.measure_option

    def fails(wanted: object, name: str, *rest: object) -> None:
        if name == "full":
            raise RuntimeError("out of time")
        measure_option(wanted, name, *rest)

    monkeypatch.setattr(bench_memory, "measure_option", fails)
    with pytest.raises(RuntimeError):
        bench_memory.run(memory_request(), tmp_path)
    read = json.loads((tmp_path / "memory.json").read_text())
    assert list(read["measured"]) == ["step, nothing"]


def test_weights_are_drawn_once_and_shared_by_all_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn, held = [], set()
    first_weights, built = bench_memory.first_weights, bench_memory.built

    def counted(*given: object) -> dict:
        drawn.append(first_weights(*given))
        return drawn[-1]

    def watched(*given: object) -> tuple:
        model, offloader = built(*given)
        held.add(model.proj_out.weight.data_ptr())
        return model, offloader

    monkeypatch.setattr(bench_memory, "first_weights", counted)
    monkeypatch.setattr(bench_memory, "built", watched)
    bench_memory.run(memory_request(), tmp_path)
    assert len(drawn) == 1 and held == {drawn[0]["proj_out.weight"].data_ptr()}


def test_what_fits_is_asked_of_an_attention_that_keeps_as_much_and_computes_nothing(tmp_path: Path):
    cfg = bench_model.model_of(["model.num_layers=2", "model.num_heads=2", "model.attention=sdpa"])
    weights = bench_memory.first_weights(cfg, torch.float32, torch.device("cpu"))
    request = bench_model.ModelBenchRequest(cfg, tokens=256, caption=16)
    batch = bench_model.batch_of(request, torch.float32, torch.device("cpu"))
    saved = []
    for inside in (nullcontext(), stubbed()):
        with inside:
            model, _ = bench_memory.built(cfg, {}, weights, torch.device("cpu"))
            saved.append(bench_memory.peak_of(model, batch, torch.device("cpu"), None)[1])
    assert saved[1] == pytest.approx(saved[0], rel=0.05)
    wanted = memory_request(options=("nothing",), budget=40 * 2**20, fits=64)
    read = json.loads(bench_memory.run(wanted, tmp_path).read_text())
    assert read["facts"]["64 tokens, nothing"] == "trains"


def test_the_parts_of_the_gpu_suite_fit_into_ten_minutes():
    suite = (REPO / "benchmarks/gpu_suite.sh").read_text()
    limits = [int(seconds) for seconds in re.findall(r"^part \w+ (\d+) ", suite, re.M)]
    assert len(limits) == 9 and sum(limits) < 600


def suite(
    out: Path, *words: str, python: str = sys.executable, **extra: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python, "CUDA_VISIBLE_DEVICES": "", **extra}
    command = ["bash", str(REPO / "benchmarks/gpu_suite.sh"), "--toy", *words, str(out)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_gpu_suite_runs_at_toy_size_on_a_cpu(tmp_path: Path):
    done = suite(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "suite.md").read_text().count("| passed |") == 9
    for name in ("ceilings", "block", "train_480p/train", "train_three/train", "checkpoint/ckpt",
                 "memory/memory", "sampling"):  # fmt: skip
        assert json.loads((tmp_path / f"{name}.json").read_text())["measured"], name
    assert json.loads((tmp_path / "quickstart/summary.json").read_text())["steps"] == 2
    # Every number that is predicted was measured, but for kernels that a CPU lacks.
    rows = (tmp_path / "predicted.md").read_text().splitlines()
    lacking = [row for row in rows if row.startswith("| ") and "| - |" in row]
    assert all("ceilings" in row or "MFU" in row or "MiB" in row for row in lacking), lacking


def fake_python(folder: Path) -> Path:
    """An interpreter that notes what it is asked for, and for which everything of `sora bench` fails."""
    fake = folder / "python"
    fake.write_text(
        f'#!/bin/sh\necho "$*" >> {folder}/asked\n'
        'case "$*" in *"sora_train bench"*) echo broken; exit 3;; esac\n'
    )
    fake.chmod(0o755)
    return fake


def test_a_part_that_fails_stops_no_other_and_one_that_passed_is_not_run_again(tmp_path: Path):
    fake, out = str(fake_python(tmp_path)), tmp_path / "out"
    done = suite(out, python=fake)
    table = (out / "suite.md").read_text()
    assert done.returncode == 1, done.stderr
    assert "| checkpoint | failed with exit code 3 |" in table
    assert table.count("| passed |") == 7
    assert (out / "checkpoint.log").read_text() == "broken\n"
    (tmp_path / "asked").write_text("")
    # Elsewhere, from what was packed: only what had failed is tried again.
    again = suite(tmp_path / "elsewhere", "--from", str(out), python=fake)
    assert again.returncode == 1 and again.stdout.count("passed before") == 7
    asked = [
        line for line in (tmp_path / "asked").read_text().splitlines() if "predicted" not in line
    ]
    assert len(asked) == 2 and all("sora_train bench" in line for line in asked)
    assert (tmp_path / "elsewhere/suite.md").read_text().count("| failed ") == 2


def test_compile_caches_travel_with_the_results(tmp_path: Path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nls "$TRITON_CACHE_DIR"\necho kernel > "$TRITON_CACHE_DIR/kernel"\n')
    fake.chmod(0o755)
    suite(tmp_path / "out", python=str(fake), SORA_PARTS="block")
    assert (tmp_path / "out/block.log").read_text() == ""
    suite(
        tmp_path / "next", "--from", str(tmp_path / "out"), python=str(fake), SORA_PARTS="sampling"
    )
    assert (tmp_path / "next/sampling.log").read_text() == "kernel\n"


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
