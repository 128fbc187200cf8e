"""The tracker follows the run folder from outside and can do the run no harm."""

import fcntl
import io
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sora_train.base.contact_sheet import contact_sheet
from sora_train.cli import run as cli_run
from sora_train.config.sections.outputs import TrackerConfig
from sora_train.data.decode.video_io import encode_h264
from sora_train.errors import UserError
from sora_train.monitoring.tracking import feed as tracking_feed
from sora_train.monitoring.tracking import process as tracking
from sora_train.monitoring.tracking.feed import Feed, Tail, replay
from sora_train.monitoring.tracking.process import start_tracker

WANDB = TrackerConfig(kind="wandb", mode="offline")


class FakeSink:
    """Keeps what it is given; `safe` says at once that it has it for good."""

    name = "fake"

    def __init__(self, *, safe: bool = False, confirmed: int = -1) -> None:
        self.rows: list[dict[str, float]] = []
        self.pictures: list[tuple[int, list[str], bool]] = []
        self.alerts: list[tuple[int, str, str]] = []
        self.settings: dict[str, Any] = {}
        self.safe, self.confirmed = safe, confirmed

    def confirmed_step(self) -> int:
        return self.confirmed

    def config(self, values: dict[str, Any]) -> None:
        self.settings = values

    def row(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        self.rows.append({"step": step, **values})

    def samples(self, step: int, clips: list[tuple[Path, str]], sheet: Path | None) -> None:
        self.pictures.append((step, [prompt for _, prompt in clips], sheet is not None))

    def alert(self, step: int, title: str, text: str) -> None:
        self.alerts.append((step, title, text))

    def flush(self) -> bool:
        return self.safe

    def close(self) -> None:
        pass


def add_rows(run_dir: Path, *steps: int, **values: float) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in steps:
            row = {"step": step, "time": 0.0, **(values or {"train/loss": 1.0 / step})}
            file.write(json.dumps(row) + "\n")


def steps_of(sink: FakeSink) -> list[int]:
    return [int(row["step"]) for row in sink.rows]


def test_no_tracker_starts_nothing(tmp_path: Path):
    tracker = start_tracker(TrackerConfig(kind="none"), tmp_path)
    tracker.finish()
    assert tracker.trackers == [] and not list(tmp_path.iterdir())


def test_tail_gives_each_whole_line_once(tmp_path: Path):
    tail = Tail(tmp_path / "metrics.jsonl")
    assert list(tail.rows()) == []
    add_rows(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "ti')
        file.flush()
        assert [row["step"] for row in tail.rows()] == [1]
        file.write('me": 0}\n')
    assert [row["step"] for row in tail.rows()] == [2]
    assert list(tail.rows()) == []


def test_tail_reads_any_length_in_bounded_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracking_feed, "BLOCK_BYTES", 64)  # less than a row, and than several
    add_rows(tmp_path, *range(1, 40))
    add_rows(tmp_path, 40, **{f"train/loss/term{i}": 0.1 for i in range(20)})
    tail = Tail(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in tail.rows()] == list(range(1, 41))


def test_tail_leaves_out_what_is_no_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    add_rows(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('\x00\x00garbage\n[]\n{"time": 1}\n')
    add_rows(tmp_path, 2)
    assert [row["step"] for row in Tail(tmp_path / "metrics.jsonl").rows()] == [1, 2]
    assert capsys.readouterr().out.count("damaged") == 3


def replaced(run_dir: Path, *steps: int) -> None:
    """metrics.jsonl as a run that goes on from an earlier step leaves it: another file under its name."""
    path = run_dir / "metrics.jsonl"
    path.rename(run_dir / "old")
    add_rows(run_dir, *steps)


def test_tail_notices_another_file_that_is_longer(tmp_path: Path):
    add_rows(tmp_path, 1, 2)
    tail = Tail(tmp_path / "metrics.jsonl")
    assert len(list(tail.rows())) == 2
    replaced(tmp_path, 1)
    add_rows(tmp_path, 2, 3, 4, **{"train/loss": 0.123456789012345})
    assert [row["step"] for row in tail.rows()] == [1, 2, 3, 4]


@pytest.mark.parametrize("back", [0, 1, 4])
@pytest.mark.parametrize("restarted", [True, False])
def test_going_on_from_an_earlier_step_loses_no_row_and_repeats_none(
    back: int, restarted: bool, tmp_path: Path
):
    sink = FakeSink()
    feed = Feed(sink, tmp_path)
    add_rows(tmp_path, 1, 2, 3, 4)
    add_rows(tmp_path, 4, **{"val/loss": 0.5})
    feed.push()
    if restarted:
        feed.save()
        feed = Feed(sink, tmp_path)
    replaced(tmp_path, *range(1, back + 1))
    feed.push()
    add_rows(tmp_path, *range(back + 1, 7))
    add_rows(tmp_path, 4, **{"val/loss": 0.5})
    add_rows(tmp_path, 6, **{"val/loss": 0.4})
    feed.push()
    assert [int(row["step"]) for row in sink.rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [int(row["step"]) for row in sink.rows if "val/loss" in row] == [4, 6]


def test_rows_that_were_not_confirmed_are_sent_again(tmp_path: Path):
    add_rows(tmp_path, 1, 2)
    Feed(FakeSink(), tmp_path).push()  # killed before save()
    sink = FakeSink()
    assert Feed(sink, tmp_path).push() == 2
    assert steps_of(sink) == [1, 2]


def test_rows_that_the_tracker_says_it_has_are_not(tmp_path: Path):
    add_rows(tmp_path, 1, 2, 3)
    sink = FakeSink(confirmed=2)
    Feed(sink, tmp_path).push()
    assert steps_of(sink) == [3]


def test_what_is_safe_at_once_is_remembered_at_once(tmp_path: Path):
    add_rows(tmp_path, 1, 2)
    Feed(FakeSink(safe=True), tmp_path).push()  # killed right after
    add_rows(tmp_path, 3)
    sink = FakeSink(safe=True)
    Feed(sink, tmp_path).push()
    assert steps_of(sink) == [3]


def sampled(run_dir: Path, step: int = 50) -> Path:
    """A folder of samples that is whole but for its contact sheet."""
    folder = run_dir / f"samples/step-{step:06d}"
    folder.mkdir(parents=True)
    encode_h264(np.zeros((3, 16, 16, 3), np.uint8), 8.0, folder / "000.mp4")
    prompts = [{"prompt": "a red square", "file": "000.mp4", "seed": 0}]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return folder


def test_config_and_whole_samples_are_sent_once(tmp_path: Path):
    sink = FakeSink()
    feed = Feed(sink, tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    folder = sampled(tmp_path)
    feed.push()
    assert sink.settings == {"seed": 3}
    assert sink.pictures == [], "the contact sheet is still to come"
    contact_sheet([np.zeros((1, 8, 8, 3), np.uint8)], ["x"], folder / "contact_sheet.png")
    feed.push()
    feed.push(final=True)
    assert sink.pictures == [(50, ["a red square"], True)]


def test_a_damaged_folder_per_sample_does_not_keep_the_rows_back(tmp_path: Path):
    sink = FakeSink()
    (sampled(tmp_path) / "prompts.json").write_text("{")
    add_rows(tmp_path, 1)
    Feed(sink, tmp_path).push(final=True)
    assert steps_of(sink) == [1] and sink.pictures == []


def test_the_run_id_stays_until_a_new_run_is_wanted(tmp_path: Path):
    first = tracking.run_id(tmp_path)
    assert tracking.run_id(tmp_path) == first
    assert tracking.run_id(tmp_path, new=True) != first


def test_an_agents_run_has_the_id_that_the_agent_chose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    alone, swept = tmp_path / "alone", tmp_path / "swept"
    for folder in (alone, swept):
        (folder / tracking.FOLDER).mkdir(parents=True)
    assert tracking.run_id(alone) != "chosen", (
        "a variable left in a shell would join all runs in one"
    )
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert tracking.run_id(swept) == "chosen"
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert tracking.run_id(swept) == "chosen", (
        "started again by hand, it goes on in the same W&B run"
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kinds": ["mlflow"]}, "--kind mlflow"),
        ({"mode": "later"}, "--mode later"),
        ({}, "metrics.jsonl"),
    ],
)
def test_replay_of_what_cannot_be_is_a_sentence(options: dict[str, Any], said: str, tmp_path: Path):
    if options:
        add_rows(tmp_path, 1)
    with pytest.raises(UserError, match=said):
        replay(tmp_path, **options)


def events_of(run_dir: Path) -> list[Any]:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    files = sorted((run_dir / "tensorboard").iterdir())
    return [e for path in files for e in loader.RawEventFileLoader(str(path)).Load()]


def test_tensorboard_gets_scalars_and_moving_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    messages = pytest.importorskip("tensorboard.compat.proto.event_pb2")
    (tmp_path / "config.yaml").write_text("seed: 3\ntracker: {kind: tensorboard}\n")
    add_rows(tmp_path, 1, 2)
    folder = sampled(tmp_path)
    contact_sheet([np.zeros((1, 8, 8, 3), np.uint8)], ["x"], folder / "contact_sheet.png")
    assert cli_run(["track", "replay", str(tmp_path)]) == 0
    add_rows(tmp_path, 3)
    assert cli_run(["track", "replay", str(tmp_path)]) == 0
    assert cli_run(["track", "replay", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "tensorboard: 2 rows sent",
        "tensorboard: 1 rows sent",
        "tensorboard: has every row already",
    ]
    events = [messages.Event.FromString(raw) for raw in events_of(tmp_path)]
    values = [(event.step, value) for event in events for value in event.summary.value]
    losses = [(step, value.simple_value) for step, value in values if value.tag == "train/loss"]
    assert losses == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    pictures = {value.tag: value for step, value in values if step == 50}
    assert set(pictures) == {"samples/000", "samples/contact_sheet"}
    with Image.open(io.BytesIO(pictures["samples/000"].image.encoded_image_string)) as gif:
        assert gif.format == "GIF" and gif.size == (16, 16)
    assert pictures["samples/000"].metadata.summary_description == "a red square"


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
    tracker.finish_seconds = 60
    tracker.finish()
    assert "sora track replay" in capsys.readouterr().err
    (log,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    assert (run_dir / "wandb_run_id").read_text() in log.name
    assert logged_steps(log) == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_an_offline_run_goes_on_as_the_same_run(tmp_path: Path):
    pytest.importorskip("wandb")
    for steps in ([1, 2, 3], [3, 4]):
        add_rows(tmp_path, *steps)
        tracker = start_tracker(WANDB, tmp_path)
        tracker.finish_seconds = 60
        tracker.finish()
    logs = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert [log.name for log in logs] == [f"run-{tracking.run_id(tmp_path)}.wandb"] * 2
    assert [logged_steps(log) for log in logs] == [[1, 2, 3], [4]]


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


def test_the_tracker_ends_after_its_parent(tmp_path: Path):
    pytest.importorskip("tensorboard")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    add_rows(run_dir, 1)
    # The parent starts the tracker and dies at once, without a word to it.
    code = (
        "import os, sys; from pathlib import Path; from sora_train.config.sections.outputs import TrackerConfig;"
        "from sora_train.monitoring.tracking.process import start_tracker;"
        "start_tracker(TrackerConfig(kind='tensorboard'), Path(sys.argv[1])); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(run_dir)], check=True, timeout=300)
    # Its lock is free once it has ended.
    wait_for((run_dir / "trackers/tensorboard.lock").exists, 60)
    with (run_dir / "trackers/tensorboard.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
    state = json.loads((run_dir / "trackers/tensorboard.json").read_text())
    assert state["last_step"] == {"train/loss": 1}


def wait_for(there: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)
