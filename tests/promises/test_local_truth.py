"""Promise 8: the files of the run folder are complete whatever the tracker does, and the run never waits for it."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentences import says

from sora_train.config import Config
from sora_train.config.messages import validated
from sora_train.config.yaml_files import load_yaml
from sora_train.monitoring.metrics import METRICS, is_clocked, read_metrics
from sora_train.monitoring.tracking import process as tracking
from sora_train.training.trainer import Trainer

STEPS = ["train.steps=2", "checkpoint.every=1", "validation.every=1", "sample.every=2"]


def untimed(run_dir: Path) -> list[dict[str, float]]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not is_clocked(key)} for row in rows]


def documented(name: str) -> bool:
    return any(
        name == known or (known.endswith("*") and name.startswith(known[:-1])) for known in METRICS
    )


def files(run_dir: Path) -> set[str]:
    """What a run leaves, the tracker's own files left out."""
    own = {"wandb", tracking.ID_FILE, tracking.FOLDER}
    return {
        str(path.relative_to(run_dir))
        for path in run_dir.rglob("*")
        if path.is_file() and path.relative_to(run_dir).parts[0] not in own
    }


@pytest.fixture
def like_it(finished_run: Path, parity_config: Callable) -> Callable:
    """`like_it("tracker=wandb")`: the config of the finished run in a folder of its own, the clips at hand."""

    def make(*overrides: str) -> Config:
        cfg = parity_config(*STEPS, *overrides)
        shutil.copytree(finished_run / "data", Path(cfg.run.dir) / "data")
        return cfg

    return make


def test_metrics_are_complete_and_every_name_is_documented(finished_run: Path) -> None:
    rows = read_metrics(finished_run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert {"step", "time", "train/loss", "train/grad_norm", "train/lr", "val/loss"} <= set(row)
        assert all(documented(name) for name in row), [n for n in row if not documented(n)]
        assert row["train/loss"] == pytest.approx(row["train/loss/velocity"])
    text = (finished_run / "metrics.jsonl").read_text()
    assert str(rows[0]["train/loss"]) in text and rows[0]["train/loss"] != round(rows[0]["train/loss"], 6)  # fmt: skip


def test_the_config_is_the_one_that_ran_and_the_fingerprint_is_whole(finished_run: Path) -> None:
    cfg = validated(Config, load_yaml(finished_run / "config.yaml"))
    assert cfg.run.dir == str(finished_run) and cfg.train.steps == 2 and cfg.name == "parity_tiny"
    fingerprint = json.loads((finished_run / "run.json").read_text())
    assert fingerprint["seed"] == cfg.seed and fingerprint["threads"] == cfg.run.threads == 1
    assert fingerprint["versions"]["torch"] == torch.__version__
    assert {"python", "machine"} <= set(fingerprint)
    state = json.loads((finished_run / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["config"] == cfg.model_dump(mode="json")


def test_offline_wandb_changes_no_file_of_the_run(
    finished_run: Path, like_it: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    cfg = like_it("tracker=wandb", "tracker.mode=offline")
    Trainer(cfg).train()
    run_dir = Path(cfg.run.dir)
    assert untimed(run_dir) == untimed(finished_run)
    assert files(run_dir) == files(finished_run)
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb"))


def test_a_tracker_that_cannot_start_does_not_touch_the_run(
    finished_run: Path,
    like_it: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tracking, "tracker_command", lambda *_: ["/nowhere/tracker"])
    cfg = like_it("tracker=wandb")
    Trainer(cfg).train()
    assert untimed(Path(cfg.run.dir)) == untimed(finished_run)
    assert files(Path(cfg.run.dir)) == files(finished_run)
    told = capsys.readouterr().err
    says(told, "metrics.jsonl", "complete")
    assert told.count("could not start") == 1


def test_a_tracker_that_hangs_is_left_behind(
    finished_run: Path,
    like_it: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It neither slows a step nor keeps the run from ending."""
    deaf = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "while True: print('x' * 5000); time.sleep(0.01)"
    )
    monkeypatch.setattr(tracking, "tracker_command", lambda *_: [sys.executable, "-c", deaf])
    waited: list[float] = []
    finish = tracking.Trackers.finish

    def timed(trackers: tracking.Trackers) -> None:
        began = time.monotonic()
        finish(trackers)
        waited.append(time.monotonic() - began)

    monkeypatch.setattr(tracking.Trackers, "finish", timed)
    cfg = like_it("tracker=wandb", "tracker.finish_seconds=0.5")
    Trainer(cfg).train()
    assert len(waited) == 1 and 0.4 < waited[0] < 3
    says(capsys.readouterr().err, "0.5 s")
    assert untimed(Path(cfg.run.dir)) == untimed(finished_run)
