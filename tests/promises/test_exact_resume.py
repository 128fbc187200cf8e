"""Promise 3: kill it anywhere; the resumed run is bit for bit the uninterrupted one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sora_train import checkpoint as checkpoints
from sora_train.data.sample import Failure
from sora_train.errors import ConfigError, UserError
from sora_train.metrics import read_metrics
from sora_train.trainer import Trainer

ADAMW = ("optim=adamw", "optim.warmup_steps=2", "optim.decay=linear")
UNTIMED = ("time", "train/step_seconds", "train/data_wait", "train/tokens_per_second")


class Killed(Exception):
    """Stands for the end of a process, at a step of our choice."""


class DyingTrainer(Trainer):
    dies_after = 4

    def callbacks(self):
        def die(trainer: Trainer, row: dict[str, float]) -> None:
            if trainer.step == self.dies_after:
                raise Killed

        return [die]


def rows(run_dir: Path) -> list[dict[str, float]]:
    found = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in UNTIMED} for row in found]


def tensors(cfg) -> dict[str, torch.Tensor]:
    trainer = Trainer(cfg)
    copies = {name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for name, tensor in
              trainer.tensors().items()}  # fmt: skip
    copies = {name: tensor.clone() for name, tensor in copies.items()}
    trainer.close()
    return copies


@pytest.mark.parametrize("dies_after", [3, 4])
def test_resumed_run_is_the_straight_run(parity_config: Callable, dies_after: int) -> None:
    """Killed right after a checkpoint (step 3) and one step behind it."""
    straight, broken = parity_config(*ADAMW, name="straight"), parity_config(*ADAMW, name="broken")
    Trainer(straight).train()
    DyingTrainer.dies_after = dies_after
    with pytest.raises(Killed):
        DyingTrainer(broken).train()
    Trainer(broken).train()

    assert rows(Path(broken.run.dir)) == rows(Path(straight.run.dir))
    expected, found = tensors(straight), tensors(broken)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_everything_that_trains_is_in_the_checkpoint(parity_config: Callable) -> None:
    cfg = parity_config(*ADAMW, "train.steps=1")
    Trainer(cfg).train()
    found = checkpoints.find(Path(cfg.run.dir))
    stored = {name.split(".")[0] for name in tensors(cfg)}
    assert stored == {"model", "optim", "ema"}
    state = found.state()
    assert (
        state["step"] == 1
        and state["samples_seen"] > 0
        and state["spec"]["prediction"] == "velocity"
    )


def test_the_quarantine_is_in_the_checkpoint(parity_config: Callable) -> None:
    cfg = parity_config("train.steps=2", "data.max_drop_fraction=0.1")
    trainer = Trainer(cfg)
    trainer.data.loader.quarantine.add(0, Failure(1, "decode_timeout", "no answer"), key="k")
    trainer.save()
    trainer.close()
    file = trainer.folder.path / "quarantine.jsonl"
    written = file.read_bytes()
    file.unlink()
    again = Trainer(cfg)
    assert again.data.loader.quarantine.counts() == {"decode_timeout": 1}
    assert file.read_bytes() == written
    again.close()


def test_a_torn_save_is_never_chosen(parity_config: Callable) -> None:
    cfg = parity_config(*ADAMW)
    Trainer(cfg).train()
    folder = Path(cfg.run.dir) / "checkpoints"
    newest = checkpoints.list_checkpoints(folder)[-1]
    assert newest.step == 6
    (newest.path / "MANIFEST.json").unlink()
    assert [found.step for found in checkpoints.list_checkpoints(folder)] == [3]
    before = checkpoints.list_checkpoints(folder)[-1]
    with (before.path / "state.json").open("a") as file:
        file.write(" ")
    assert checkpoints.list_checkpoints(folder) == []


def test_checkpoint_of_another_model_is_refused(parity_config: Callable) -> None:
    """Both at the run folder's own config, and where that file is gone, at the tensors."""
    cfg = parity_config("train.steps=1")
    Trainer(cfg).train()
    with pytest.raises(ConfigError, match=r"model\.num_layers was 2, is 3"):
        Trainer(parity_config("train.steps=1", "model.num_layers=3"))
    (Path(cfg.run.dir) / "config.yaml").unlink()
    with pytest.raises(UserError, match="checkpoint of another model"):
        Trainer(parity_config("train.steps=1", "model.num_layers=3"))


def test_a_changed_source_is_refused(parity_config: Callable) -> None:
    cfg = parity_config("train.steps=1")
    Trainer(cfg).train()
    with pytest.raises(UserError, match="manifest changed"):
        Trainer(parity_config("train.steps=2", "data.shapes_clips=20"))


def test_a_live_run_folder_is_locked(parity_config: Callable) -> None:
    cfg = parity_config("train.steps=1")
    trainer = Trainer(cfg)
    with pytest.raises(UserError, match="in use by a live run"):
        Trainer(cfg)
    trainer.close()


def test_a_full_disk_leaves_no_checkpoint_behind(parity_config: Callable, monkeypatch) -> None:
    """The disk fills while the manifest is written: nothing may lie under the final name."""
    cfg = parity_config("train.steps=1")

    def no_space(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_write", no_space)
    with pytest.raises(Exception, match="cannot write the checkpoint .*No space left"):
        Trainer(cfg).train()
    folder = Path(cfg.run.dir) / "checkpoints"
    assert checkpoints.list_checkpoints(folder) == []
    assert not [path for path in folder.iterdir() if not path.name.endswith(".tmp")]


def test_metrics_are_whole_numbers_of_json(parity_config: Callable) -> None:
    cfg = parity_config("train.steps=2")
    Trainer(cfg).train()
    lines = (Path(cfg.run.dir) / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    assert [row["step"] for row in parsed] == [1, 2]
    assert all("train/loss" in row for row in parsed)
