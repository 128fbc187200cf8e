"""Promise 1: the same seed and config give the same loss curve at any world size, sharding and accumulation.

Plain SGD without clipping: AdamW and clipping both hide a wrong gradient scale.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.monitoring.metrics import read_metrics
from sora_train.tools.doctor.replay.replay import ReplayRequest, facts, replay
from sora_train.training.trainer import Trainer

PLAIN_SGD = ["optim=sgd", "optim.lr=0.05", "optim.grad_clip=0", "optim.warmup_steps=0"]
WORKER = Path(__file__).with_name("layout_worker.py")
COMPARED = (
    "train/loss",
    "train/grad_norm",
    "train/clips",
    "val/loss",
    "val/loss/t0.30",
    "val/loss/i2v",
    "val/live/loss",
)


def curve(run_dir: Path) -> list[dict[str, float]]:
    return [
        {key: row[key] for key in COMPARED if key in row}
        for row in read_metrics(run_dir / "metrics.jsonl")
    ]


def train(cfg: Config) -> list[dict[str, float]]:
    Trainer(cfg).train()
    return curve(Path(cfg.run.dir))


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected) > 0
    for step, (row, reference) in enumerate(zip(found, expected, strict=True), 1):
        assert row == pytest.approx(reference, rel=1e-5), f"step {step}"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The curve of one process, which the others are compared with."""
    run_dir = tmp_path_factory.mktemp("one") / "run"
    return train(compose(["experiment=parity_tiny", f"run.dir={run_dir}", *PLAIN_SGD]).config)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_follow_one_process(parity_config: Callable, tmp_path: Path) -> None:
    """Validation included, with a slot left over (3 micro-batches on 2 ranks); test_parity_matrix has all layouts."""
    cell = [*PLAIN_SGD, "train.micro_batches=3", "train.steps=4"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(WORKER),
    ]
    run = subprocess.run(
        [*command, str(tmp_path), json.dumps(cell)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert_same(curve(tmp_path / "cell-0"), train(parity_config(*cell, name="three")))
    # What two ranks trained, with a slot left over, is replayed by one process.
    run_dir = tmp_path / "cell-0"
    replay(ReplayRequest(run_dir, 4, out=tmp_path / "replay"))
    found = facts(tmp_path / "replay")
    logged = read_metrics(run_dir / "metrics.jsonl")[3]["train/loss"]
    assert found["loss"] == pytest.approx(logged, abs=1e-6) and found["steps_before"] == 0
    assert sum(s["share"] for s in found["samples"]) == pytest.approx(logged, abs=1e-6)
    assert {(s["rank"], s["slot"]) for s in found["samples"]} == {(0, 0), (1, 0), (0, 1)}


def test_decode_workers_change_nothing(
    one: list[dict[str, float]], parity_config: Callable
) -> None:
    assert train(parity_config(*PLAIN_SGD, "data.num_workers=2", "data.prefetch=1")) == one


def test_another_seed_is_another_run(one: list[dict[str, float]], parity_config: Callable) -> None:
    """The comparison above could not fail if every run gave one curve."""
    other = train(parity_config(*PLAIN_SGD, "train.steps=1", "seed=1"))
    assert one[0]["train/loss"] != pytest.approx(other[0]["train/loss"], rel=1e-5)
