"""Checkpoints in an object store: the manifest is the commit, and a store that is away costs no local checkpoint."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from s3_server import S3Server
from sentences import refuses, says
from torch import Tensor

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint import remote as remote_module
from sora_train.checkpoint.layout import name_of
from sora_train.checkpoint.remote import Remote
from sora_train.checkpoint.saver import Saver
from sora_train.config import Config
from sora_train.config.sections.outputs import CheckpointConfig
from sora_train.data.storage.remote import _of_scheme, filesystem
from sora_train.errors import ConfigError, Fault
from sora_train.runtime.world import World
from sora_train.training.outputs.saving import bring_together, open_remote
from sora_train.training.trainer import Trainer

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
URL = "s3://bucket/runs/mine"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def tensors_of(value: float) -> dict[str, Tensor]:
    return {"model.w": torch.full((1000,), value)}


def value_of(found: checkpoints.Checkpoint) -> float:
    into = tensors_of(-1.0)
    checkpoints.load(found, into, None)
    return float(into["model.w"].unique())


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    pytest.importorskip("s3fs")
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    with S3Server(tmp_path / "s3") as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(remote_module, "FIRST_PAUSE_SECONDS", 0.05)
        _of_scheme.cache_clear()
        filesystem(URL).clear_instance_cache()
        _of_scheme.cache_clear()
        yield found
    _of_scheme.cache_clear()


def a_remote(seconds: float = 20.0) -> Remote:
    return Remote(filesystem(URL), URL, seconds)


def a_saver(folder: Path, remote: Remote, **values: object) -> Saver:
    return Saver(folder, CheckpointConfig(**values), ALONE, timedelta(seconds=60), remote)


def test_up_and_down_again(tmp_path: Path, server: S3Server) -> None:
    saver = a_saver(tmp_path / "here", a_remote(), keep_last=2)
    saver.rehearse(tensors_of(0.0), {})
    for step in (1, 2, 3):
        saver.save(step, tensors_of(step), {"step": step})
    saver.wait()
    stored = server.folder / "bucket" / "runs" / "mine"
    left = sorted(path.name for path in stored.iterdir() if any(path.iterdir()))
    assert left == ["step-000002", "step-000003"]
    puts = [path for path, what in server.asked if what == "put" and "step-000003" in path]
    assert puts[-1].endswith("/MANIFEST.json") and len(puts) == 4, "the commit comes last"

    there = tmp_path / "there"
    there.mkdir()
    assert a_remote().steps() == [2, 3]
    bring_together(a_remote(), there)
    (found,) = checkpoints.list_checkpoints(there)
    assert (found.step, value_of(found), found.state()) == (3, 3.0, {"step": 3})
    asked = len(server.asked)
    bring_together(a_remote(), there)
    assert not [row for row in server.asked[asked:] if "distcp" in row[0]], "it is here already"


def test_what_has_no_manifest_there_is_no_checkpoint(tmp_path: Path, server: S3Server) -> None:
    saver = a_saver(tmp_path / "here", a_remote())
    saver.save(1, tensors_of(1.0), {})
    saver.save(2, tensors_of(2.0), {})
    saver.wait()
    (server.folder / "bucket/runs/mine/step-000002/MANIFEST.json").unlink()
    bring_together(a_remote(), tmp_path / "there")
    assert [found.step for found in checkpoints.list_checkpoints(tmp_path / "there")] == [1]


def test_a_damaged_one_there_is_refused(tmp_path: Path, server: S3Server) -> None:
    saver = a_saver(tmp_path / "here", a_remote())
    saver.save(1, tensors_of(1.0), {})
    saver.wait()
    file = server.folder / "bucket/runs/mine/step-000001/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with refuses(Fault, "s3://bucket", "step-000001", "digest"):
        bring_together(a_remote(), tmp_path / "there")
    assert checkpoints.list_checkpoints(tmp_path / "there") == []


def test_a_store_that_stumbles_is_asked_again(tmp_path: Path, server: S3Server) -> None:
    server.put_faults.extend(["503", "503"])
    saver = a_saver(tmp_path / "here", a_remote())
    saver.save(1, tensors_of(1.0), {})
    saver.wait()
    assert a_remote().steps() == [1]


@pytest.mark.parametrize("how", ["down", "gone", "denied"])
def test_a_bucket_that_vanishes_while_saving(tmp_path: Path, server: S3Server, how: str) -> None:
    saver = a_saver(tmp_path / "here", a_remote(seconds=1.0))
    saver.save(1, tensors_of(1.0), {})
    saver.wait()
    server.put_always = {"down": "503", "gone": "404", "denied": "403"}[how]
    began = time.monotonic()
    saver.save(2, tensors_of(2.0), {})
    saver._thread.join()
    error = saver.poll()
    assert isinstance(error, Fault) and time.monotonic() - began < 60
    says(error, "checkpoint.remote=s3://bucket/runs/mine", "cannot upload", "step-000002/")
    assert "\n" not in str(error)
    with pytest.raises(Fault):
        saver.wait()
    found = checkpoints.list_checkpoints(tmp_path / "here")
    assert [value_of(entry) for entry in found] == [1.0, 2.0], "the local ones are whole"
    server.put_always = ""
    assert a_remote().steps() == [1]


def test_a_store_that_takes_nothing_is_met_before_the_first_step(
    tmp_path: Path, server: S3Server
) -> None:
    server.put_always = "403"
    with refuses(Fault, "checkpoint.remote", "cannot upload", "rehearsal"):
        a_saver(tmp_path / "here", a_remote(seconds=1.0)).rehearse(tensors_of(0.0), {})


def test_an_address_is_asked_for() -> None:
    with refuses(ConfigError, "checkpoint.remote=/mnt/x", "write", "s3://"):
        open_remote(Config.model_validate({"checkpoint": {"remote": "/mnt/x"}}))
    assert open_remote(Config()) is None


def test_states_are_read_there_for_the_best(tmp_path: Path, server: S3Server) -> None:
    saver = a_saver(tmp_path / "here", a_remote(), keep_last=1, keep_best=1)
    for step, loss in enumerate([0.5, 0.1, 0.3], 1):
        saver.save(step, tensors_of(step), {"row": {"val/loss": loss}})
    saver.wait()
    assert a_remote().steps() == [2, 3]
    assert json.loads((server.folder / "bucket/runs/mine/step-000002/state.json").read_text())
    assert os.environ["AWS_DEFAULT_REGION"]


SHORT = (
    "train.steps=2", "checkpoint.every=0", "validation.every=0", "sample.every=0", "checkpoint.remote_seconds=1.0",
    "checkpoint.remote=s3://bucket/runs/mine",
)  # fmt: skip


def test_the_same_command_again_uploads_what_could_not_be(
    parity_config: Callable, server: S3Server, tmp_path: Path
):
    cfg = parity_config(*SHORT)
    server.put_always = "503"
    with pytest.raises(Fault):
        Trainer(cfg).train()
    server.put_always = ""
    Trainer(cfg).train()
    assert a_remote().steps() == [2]
    # To look is not to fetch.
    shutil.rmtree(Path(cfg.run.dir) / "checkpoints")
    Trainer(cfg.model_copy(update={"dry_run": True})).train()
    assert not list(Path(cfg.run.dir).glob("checkpoints/step-*"))


def test_a_branch_that_was_left_does_not_outlive_the_new_one(tmp_path: Path, server: S3Server):
    saver = a_saver(tmp_path / "here", a_remote(), keep_last=1)
    for step in (10, 8):
        saver.save(step, tensors_of(float(step)), {})
        saver.wait()
        shutil.rmtree(tmp_path / "here" / name_of(step))
    assert a_remote().steps() == [8]
