"""Promises 6 and 8 in a run: it ends when its last save is a checkpoint, hears of a failed one at the next step, and
starts only where there is room for them."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from sentences import refuses

from sora_train import __version__
from sora_train import checkpoint as checkpoints
from sora_train.checkpoint import saver as saver_module
from sora_train.checkpoint.points import VARIABLE
from sora_train.errors import Fault, Preempted, UserError
from sora_train.monitoring.metrics import read_metrics
from sora_train.runtime.preemption import listening
from sora_train.training.outputs.saving import config_digest, tracker_run_id
from sora_train.training.trainer import Trainer


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing takes so long that whoever does not wait for it is gone by then."""
    write = saver_module.write

    def slowly(*args, **kwargs):
        time.sleep(0.7)
        return write(*args, **kwargs)

    monkeypatch.setattr(saver_module, "write", slowly)


@pytest.mark.usefixtures("slow_disk")
def test_the_end_of_a_run_is_a_checkpoint_that_says_what_made_it(parity_config: Callable) -> None:
    cfg = parity_config("train.steps=2", "validation.every=1", "checkpoint.rehearse=true")
    (Path(cfg.run.dir)).mkdir(parents=True)
    (Path(cfg.run.dir) / "wandb_run_id").write_text("abc123")
    Trainer(cfg).train()
    found = checkpoints.find(Path(cfg.run.dir))
    state = found.state()
    assert found.step == 2 and state["row"]["val/loss"] > 0
    assert state["digests"]["config"] == config_digest(cfg)
    assert state["digests"]["vae"] == state["spec"]["vae_digest"] != ""
    assert state["digests"]["manifest"] == state["manifest_digest"]
    assert state["code"]["package"] in (__version__, "") and state["rng_key"] == cfg.seed
    assert state["wandb_run_id"] == "abc123" and tracker_run_id(Path("nowhere")) == ""
    assert sorted(path.name for path in found.path.parent.iterdir()) == ["latest", "step-000002"]


@pytest.mark.usefixtures("slow_disk")
def test_a_run_that_is_told_to_leave_leaves_a_checkpoint(parity_config: Callable) -> None:
    """Even where a save is on its way already."""

    class Told(Trainer):
        def callbacks(self):
            return [lambda trainer, row: trainer.step == 2 and os.kill(os.getpid(), signal.SIGTERM)]

    cfg = parity_config("checkpoint.every=1", "validation.every=0")
    with listening(), pytest.raises(Preempted, match=r"step \d is saved"):
        Told(cfg).train()
    newest = checkpoints.find(Path(cfg.run.dir)).step
    rows = read_metrics(Path(cfg.run.dir) / "metrics.jsonl")
    assert 2 <= newest == rows[-1]["step"] <= 3


def test_a_failed_save_ends_the_run_at_the_next_step(
    parity_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "fail:before_manifest")
    steps = ["checkpoint.every=1", "validation.every=0", "train.steps=6"]
    cfg = parity_config(*steps, "checkpoint.rehearse=true")  # in which it does not fail
    with refuses(Fault, "step-000001", "No space left"):
        Trainer(cfg).train()
    assert len(read_metrics(Path(cfg.run.dir) / "metrics.jsonl")) < 4
    assert checkpoints.list_checkpoints(Path(cfg.run.dir) / "checkpoints") == []


def test_a_run_without_room_does_not_start(
    parity_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage
    small = SimpleNamespace(total=1 << 30, used=0, free=2 << 20)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: small if "run" in str(path) else usage(path)
    )
    cfg = parity_config()
    with refuses(UserError, "2 MiB", "3 MiB", "keep_last=2"):  # fmt: skip
        Trainer(cfg)
