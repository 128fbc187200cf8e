"""Promise 6: every wait has a deadline, and exit 0 means that every rank finished and the last checkpoint is there."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sentences import refuses

from sora_train import checkpoint as checkpoints
from sora_train.errors import Fault
from sora_train.monitoring.metrics import read_metrics
from sora_train.training.trainer import Trainer

DEADLINE = 2.0
WORKER = Path(__file__).with_name("failing_worker.py")


@pytest.fixture
def spinning_trainer(parity_config: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A trainer one of whose clips spins in native code, holding the interpreter lock, for ever."""

    def make(*overrides: str) -> tuple[Trainer, str]:
        trainer = Trainer(parity_config(f"data.decode_timeout={DEADLINE}", *overrides))
        key = str(trainer.data.manifest.key[trainer.data.tape[0].rows[0]])
        # Set only now, since the clips are rendered by processes of the same kind.
        monkeypatch.setenv("SORA_TEST_DECODE", f"spin={key}")
        return trainer, key

    return make


@pytest.mark.timeout(400)
def test_a_decoder_that_spins_costs_its_clip_only(spinning_trainer: Callable) -> None:
    trainer, key = spinning_trainer("data.max_drop_fraction=0.05", "train.steps=4", "checkpoint.every=0")  # fmt: skip
    began = time.monotonic()
    trainer.train()
    assert time.monotonic() - began < 200

    run_dir = trainer.folder.path
    lines = [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["step"], line["key"], line["reason"]) for line in lines] == [
        (0, key, "decode_timeout")
    ]
    assert f"{DEADLINE:g} s" in lines[0]["detail"]
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    clips = [len(trainer.data.tape[index].rows) for index in range(2)]
    assert rows[0]["train/clips"] == sum(clips) - 1 and rows[0]["train/dropped"] == 1
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["clips"] == {"used": 23, "dropped": 0, "failed": 1, "total": 24}
    assert checkpoints.find(run_dir).step == 4


@pytest.mark.timeout(400)
def test_past_the_limit_the_run_stops_and_says_why(spinning_trainer: Callable) -> None:
    trainer, _ = spinning_trainer("data.max_drop_fraction=0.01")
    pids: list[int] = []
    with refuses(Fault, "decode_timeout 1", "data.max_drop_fraction=0.01", "quarantine"):
        try:
            trainer.train()
        finally:
            pids = trainer.data.loader._pool.pids
    assert not pids, "its decode processes are gone"
    assert checkpoints.list_checkpoints(trainer.folder.checkpoints) == []
    assert not (trainer.folder.path / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_that_fails_takes_the_others_with_it(tmp_path: Path, finished_run: Path) -> None:
    """Under a launcher, far sooner than the ten minutes a collective may take; test_faults has it without."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run / "data", run_dir / "data")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    settings = ["experiment=parity_tiny", f"run.dir={run_dir}", "validation.every=0", "train.steps=200"]  # fmt: skip
    began = time.monotonic()
    done = subprocess.run(
        [*launcher, str(WORKER), *settings, "checkpoint.every=0"],
        check=False, capture_output=True, text=True, timeout=300,
        env={**os.environ, "SORA_DEBUG": "0"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "error: this rank was told to fail" in done.stderr
    steps = [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")]
    assert 1 <= len(steps) <= 3, "the other rank did not go on alone"
    assert not (run_dir / "summary.json").exists()
    assert checkpoints.list_checkpoints(run_dir / "checkpoints") == []
    assert time.monotonic() - began < 250, "most of which is importing torch on a busy machine"
