"""The clip ledger and data.exclude through their commands: what is measured, written, and left out of a run."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sentences import refuses

from benchmarks.ledger import found, plant
from sora_train.cli import run as cli_run
from sora_train.config.compose import compose
from sora_train.config.sections.settings import TraceSettings
from sora_train.errors import UserError
from sora_train.monitoring.metrics import read_metrics
from sora_train.tools.data.trace import Trace
from sora_train.tools.doctor.replay.replay import ReplayRequest, facts, replay
from sora_train.training.trainer import Trainer

TINY = "experiment=parity_tiny"
SHORT = ["validation.every=2", "checkpoint.every=1", "checkpoint.keep_last=9"]


def train(folder: Path, clips: tuple[str, str], steps: int, *overrides: str) -> Trainer:
    """Train up to a step, from where the folder stands, with four steps an epoch."""
    arguments = [TINY, f"run.dir={folder}", *SHORT, *clips, f"train.steps={steps}", *overrides]
    trainer = Trainer(compose(arguments).config)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, clips: tuple[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("ledger") / "run"
    train(folder, clips, 4)
    return folder


def test_losses_are_those_of_validation_and_files_name_every_clip(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The held-out clips' losses under the averaged weights stand in metrics.jsonl since the run."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    assert cli_run(["data", "ledger", str(copy)]) == 0
    printed = capsys.readouterr().out
    assert "mislabelled" in printed and "memorised" in printed and "never learned" in printed
    out = copy / "ledger" / "step-000004"
    table = pq.read_table(out.with_suffix(".parquet"))
    about = json.loads(table.schema.metadata[b"sora_train.ledger"])
    assert about["times"] == [0.3, 0.7] and about["compared with step"] == 1
    logged = {row["step"]: row for row in read_metrics(copy / "metrics.jsonl")}[4]
    validated = [logged["val/loss/t0.30"], logged["val/loss/t0.70"]]
    assert about["held-out clips"] == pytest.approx(validated, rel=1e-5)
    columns = table.to_pydict()
    assert len(set(columns["key"])) == 24
    means = np.mean(columns["own by level"], axis=1)
    assert np.isfinite(means).all() and columns["own"] == pytest.approx(means.tolist())
    with out.with_suffix(".csv").open() as file:
        assert {row["key"] for row in csv.DictReader(file)} <= set(columns["key"])


def test_a_run_without_a_checkpoint_has_no_ledger(tmp_path: Path):
    from sora_train.tools.data.ledger import LedgerRequest, ledger

    with refuses(UserError, str(tmp_path)):
        ledger(LedgerRequest(tmp_path))


def samples(run: Path, step: int, out: Path) -> dict[str, float]:
    """Keys of the clips of a step and their losses; the step's loss is the logged one."""
    replay(ReplayRequest(run, step, out=out))
    found = facts(out)
    assert found["loss"] == pytest.approx(found["logged_loss"], abs=1e-6)
    return {sample["key"]: sample["loss"] for sample in found["samples"]}


def test_a_run_goes_on_without_excluded_clips_and_every_step_can_be_replayed(
    run: Path, clips: tuple[str, str], tmp_path: Path
):
    """Step 4 would have trained two clips that are excluded from step 3 on, in the middle of the first epoch."""
    copy, other = tmp_path / "run", tmp_path / "killed"
    data = train(copy, clips, 3).data
    keys, planned = data.manifest.key, [row for n in (6, 7) for row in data.tape[n].rows]
    gone = {str(keys[row]) for row in planned[:2]}
    (tmp_path / "out.txt").write_text("".join(f"{key}\n" for key in sorted(gone)))
    exclude = f"data.exclude={tmp_path / 'out.txt'}"
    shutil.copytree(copy, other)
    straight = train(copy, clips, 8, exclude)
    train(other, clips, 6, exclude)
    again = train(other, clips, 8, exclude)
    assert weights(straight).keys() == weights(again).keys()
    assert all(
        torch.equal(weight, weights(again)[name]) for name, weight in weights(straight).items()
    )
    assert straight.data.account() == {"used": 22, "dropped": 2, "failed": 0, "total": 24}
    changes = [json.loads(line) for line in (copy / "changes.jsonl").read_text().splitlines()]
    assert [row["step"] for row in changes if row["key"] == "data.exclude"] == [3]

    of_step = [samples(copy, step, tmp_path / "replay") for step in range(1, 9)]
    assert set(of_step[3]) == {str(keys[row]) for row in planned} - gone
    first, second = ({key for step in part for key in step} for part in (of_step[:4], of_step[4:]))
    assert first == second == {str(key) for key in keys} - gone
    traced = Trace.open(compose([TINY, f"run.dir={copy}", *clips, exclude]).config)
    rows = [row for entry in traced.rows(TraceSettings(steps="3:4")) for row in entry["samples"]]
    assert {str(keys[row]) for row in rows} == set(of_step[3])


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    tensors = trainer.parts.tensors().items()
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors}


@pytest.mark.slow
def test_planted_wrong_captions_are_found(tmp_path: Path):
    """Images of the shapes world, learned for four minutes: of captions that are exchanged, most are found early."""
    planted, wrong = plant(tmp_path / "world", 400, 0.05, image_share=1.0)
    arguments = [
        "experiment=quickstart", f"run.dir={tmp_path / 'run'}", f"data.source={planted.parent}",
        "data.val_source=shapes", "data.shapes_image_share=1", "sample.every=0", "sample.oracle_prompts=0",
        "train.steps=600", "validation.times=[0.7,0.9]", "checkpoint.every=300", "validation.every=0",
    ]  # fmt: skip
    Trainer(compose(arguments).config).train()
    assert cli_run(["data", "ledger", str(tmp_path / "run")]) == 0
    first, there = found(tmp_path / "run" / "ledger" / "step-000600.parquet", wrong)
    assert there == len(wrong) and first >= 0.8 * there
    with Image.open(tmp_path / "run" / "ledger" / "step-000600.png") as sheet:
        assert sheet.height > 300
