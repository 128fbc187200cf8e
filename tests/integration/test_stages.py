"""Stages in one folder: the hand-over is what it says, and the same command goes on where it was."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from sentences import refuses

from sora_train import checkpoint as checkpoints
from sora_train.config import Config
from sora_train.errors import ConfigError
from sora_train.monitoring.metrics import read_metrics
from sora_train.parallel.shards import full
from sora_train.train import train
from sora_train.training.trainer import Trainer

LOW = "{name: low, overrides: ['train.steps=2', 'optim=adamw']}"
HIGH = """{name: high, groups: {optim: adamw}, config: {train: {steps: 2}}, weights: live, optimizer: true}"""


class Beginnings(Trainer):
    """Keeps what every run of a chain begins with."""

    seen: dict[str, dict[str, torch.Tensor]] = {}

    def train(self) -> None:
        tensors = {name: full(tensor).clone() for name, tensor in self.parts.tensors().items()}
        self.seen[Path(self.cfg.run.dir).name] = tensors
        super().train()


def command(run_dir: Path, *stages: str) -> list[str]:
    small = ["validation.every=0", "checkpoint.every=1", "checkpoint.keep_last=1"]
    return ["experiment=parity_tiny", f"run.dir={run_dir}", *small, f"stages=[{', '.join(stages)}]"]


def test_a_stage_begins_with_the_one_before_and_the_chain_goes_on_where_it_was(tmp_path: Path):
    Beginnings.seen.clear()
    argv = command(tmp_path / "run", LOW, HIGH)
    assert train(Beginnings, Config, argv) == 0
    folders = [tmp_path / "run" / "stages" / name for name in ("01-low", "02-high")]
    low, high = (Beginnings.seen[folder.name] for folder in folders)
    assert low.keys() == high.keys()
    moved = [name for name in low if not torch.equal(low[name], high[name])]
    assert any(name.startswith("model.") for name in moved)
    assert all(
        float(high[name]) == 2
        for name in high
        if name.startswith("optim.") and name.endswith(".step")
    )
    for name in high:
        # The average begins anew, with the weights that were taken over.
        if name.startswith("ema."):
            assert torch.equal(high[name], high[name.replace("ema.", "model.", 1)])
    # What was taken over are the weights that the stage before ended with (weights: live), not their averages.
    ended = checkpoints.find(folders[0])
    averages, weights = (
        {name: torch.zeros_like(value) for name, value in high.items() if name.startswith(prefix)}
        for prefix in ("ema.", "model.")
    )
    checkpoints.load_part(ended, averages, "ema.")
    checkpoints.load_part(ended, weights, "model.")
    for name, value in weights.items():
        assert torch.equal(high[name], value), name
    assert any(not torch.equal(high[name], value) for name, value in averages.items())
    for folder in folders:
        assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == [1, 2]
        assert json.loads((folder / "summary.json").read_text())["name"].startswith("parity_tiny: ")

    # Nothing is left to do, and of a chain that was cut short only what is missing is done.
    Beginnings.seen.clear()
    train(Beginnings, Config, argv)
    assert Beginnings.seen == {}
    shutil.rmtree(folders[1])
    train(Beginnings, Config, argv)
    again = Beginnings.seen.pop("02-high")
    assert not Beginnings.seen and all(torch.equal(again[name], high[name]) for name in high)
    assert checkpoints.find(folders[1]).step == 2


@pytest.mark.parametrize(
    ("stages", "facts"),
    [
        ([LOW, LOW], ("names low, low",)),
        (["{name: low, overrides: ['run.dir=x']}"], ("low", "run.dir")),
        (["{name: low, overrides: ['optim.lrr=1']}"], ("low", "optim.lrr")),
        (["{name: low, config: {optim: {lrr: 1}}}"], ("low", "optim.lrr")),
        (["{name: a/b}"], ("no folder's name",)),
    ],
)
def test_mistakes_in_any_stage_are_told_before_the_first_one(
    tmp_path: Path, stages: list[str], facts: tuple[str, ...]
):
    with refuses(ConfigError, *facts):
        train(Beginnings, Config, command(tmp_path / "run", *stages))
    assert not (tmp_path / "run" / "stages").exists()
