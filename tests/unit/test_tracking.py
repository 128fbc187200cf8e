"""The tracker follows the run folder from outside and can do the run no harm."""

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sora_train import tracking
from sora_train.config.run import TrackerConfig
from sora_train.contact_sheet import contact_sheet
from sora_train.tracking import Feed, NullTracker, Tail, start_tracker

WANDB = TrackerConfig(kind="wandb", mode="offline")


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)


class FakeConfig(dict):
    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:
        super().update(values)


def fake_run() -> FakeRun:
    run = FakeRun()
    run.config = FakeConfig()
    return run


def add_rows(run_dir: Path, *steps: int, **values: float) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in steps:
            row = {"step": step, "time": 0.0, **(values or {"train/loss": 1.0 / step})}
            file.write(json.dumps(row) + "\n")


def steps_of(run: FakeRun) -> list[int]:
    return [values["step"] for values in run.logged]


def stand_in(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    command = [sys.executable, "-c", code]
    monkeypatch.setattr(tracking, "tracker_command", lambda cfg, run_dir: command)


def test_no_tracker_starts_nothing(tmp_path: Path):
    tracker = start_tracker(TrackerConfig(kind="none"), tmp_path)
    tracker.finish()
    assert isinstance(tracker, NullTracker)
    assert not list(tmp_path.iterdir())


def test_tail_gives_each_whole_line_once(tmp_path: Path):
    tail = Tail(tmp_path / "metrics.jsonl")
    assert tail.rows() == []
    add_rows(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ti')
        file.flush()
        assert [row["step"] for row in tail.rows()] == [1]
        file.write('me": 0}\n')
    assert [row["step"] for row in tail.rows()] == [2]
    assert tail.rows() == []


def test_a_resumed_run_sends_no_row_twice(tmp_path: Path):
    first = Feed(fake_run(), tmp_path)
    add_rows(tmp_path, 1, 2, 3)
    add_rows(tmp_path, 2, **{"val/loss": 0.5})
    first.push()
    first.save()
    # Resuming from step 2 drops step 3 from the file and writes it again.
    (tmp_path / "metrics.jsonl").unlink()
    add_rows(tmp_path, 1, 2, 3, 4)
    add_rows(tmp_path, 4, **{"val/loss": 0.4})
    run = fake_run()
    Feed(run, tmp_path).push()
    assert steps_of(run) == [4, 4]
    assert run.logged[1]["val/loss"] == 0.4


def test_rows_that_were_not_confirmed_are_sent_again(tmp_path: Path):
    add_rows(tmp_path, 1, 2)
    Feed(fake_run(), tmp_path).push()  # killed before save()
    run = fake_run()
    Feed(run, tmp_path).push()
    assert steps_of(run) == [1, 2]


def test_config_and_whole_samples_are_sent_once(tmp_path: Path):
    run = fake_run()
    feed = Feed(run, tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    folder = tmp_path / "samples/step-000050"
    folder.mkdir(parents=True)
    (folder / "000.mp4").write_bytes(b"clip")
    prompts = [{"prompt": "a red square", "file": "000.mp4", "seed": 0}]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    feed.push()
    assert run.config == {"seed": 3}
    assert run.logged == [], "the contact sheet is still to come"
    contact_sheet([np.zeros((1, 8, 8, 3), np.uint8)], ["x"], folder / "contact_sheet.png")
    feed.push()
    feed.push(final=True)
    assert steps_of(run) == [50]
    assert {"samples/000", "samples/contact_sheet"} < set(run.logged[0])


def test_a_hanging_tracker_is_killed_at_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    stand_in(monkeypatch, "import time; time.sleep(600)")
    tracker = start_tracker(WANDB, tmp_path)
    began = time.monotonic()
    tracker.finish(timeout=0.5)
    assert time.monotonic() - began < 3
    time.sleep(0.2)  # what the watching thread would say is said by now
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "metrics.jsonl is complete" in said[0] and "--once" in said[0]
    assert isinstance(tracker, tracking.ProcessTracker) and tracker._process is not None
    assert tracker._process.poll() is not None
    assert not (tmp_path / tracking.STOP_FILE).exists()


def test_a_crashing_tracker_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    stand_in(monkeypatch, "raise SystemExit(7)")
    tracker = start_tracker(WANDB, tmp_path)
    said = ""
    deadline = time.monotonic() + 10
    while "exit code 7" not in said and time.monotonic() < deadline:
        time.sleep(0.05)
        said += capsys.readouterr().err
    tracker.finish()
    said += capsys.readouterr().err
    assert said.count("exit code 7") == 1 and len(said.strip().splitlines()) == 1


def test_a_tracker_that_cannot_start_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(tracking, "tracker_command", lambda cfg, run_dir: ["/no/such/program"])
    start_tracker(WANDB, tmp_path).finish()
    assert "could not start" in capsys.readouterr().err


def test_the_run_id_stays(tmp_path: Path):
    assert tracking._run_id(tmp_path) == tracking._run_id(tmp_path)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb_cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb_data"))


@pytest.mark.usefixtures("no_network")
def test_offline_wandb_gets_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("seed: 3\nmodel: {num_layers: 2}\n")
    add_rows(run_dir, 1, 2, 3)
    tracker = start_tracker(WANDB, run_dir)
    add_rows(run_dir, 4)
    tracker.finish(timeout=60)
    assert "wandb sync" in capsys.readouterr().err
    (log,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert (run_dir / "wandb_run_id").read_text() in log.name
    assert logged_steps(log) == [1, 2, 3, 4]


def logged_steps(log: Path) -> list[int]:
    """The values of `step` in W&B's own file: a header of 7 bytes, then records of LevelDB's log."""
    pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data = log.read_bytes()
    assert len(data) < 32768, "records split over blocks are not read here"
    steps, at = [], 7
    while at < len(data):
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        assert kind == 1
        record = pb2.Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        for item in record.history.item:
            if (item.key or "/".join(item.nested_key)) == "step":
                steps.append(int(json.loads(item.value_json)))
    return steps


@pytest.mark.usefixtures("no_network")
def test_the_tracker_ends_after_its_parent(tmp_path: Path):
    pytest.importorskip("wandb")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    add_rows(run_dir, 1)
    # The parent starts the tracker and dies at once, without a word to it.
    code = (
        "import os, sys; from pathlib import Path; from sora_train.config.run import TrackerConfig;"
        "from sora_train.tracking import start_tracker;"
        "start_tracker(TrackerConfig(kind='wandb', mode='offline'), Path(sys.argv[1])); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(run_dir)], check=True, timeout=60)
    state = run_dir / tracking.STATE_FILE
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert json.loads(state.read_text())["last_step"] == {"train/loss": 1}
