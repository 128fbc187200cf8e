"""Promises 1 and 3 together: a run that goes on at other world sizes has the losses of one that never changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sora_train.errors import EXIT_REQUEUE
from sora_train.monitoring.metrics import read_metrics

DRIVER = Path(__file__).with_name("faults_driver.py")
# Twelve micro-batches are dealt out evenly over 4, 3, 2 and 1 ranks.
RUN = [
    "optim=sgd", "optim.grad_clip=0", "train.steps=8", "train.micro_batches=12", "data.micro_batch=2", "data.group=12",
    "checkpoint.every=0", "validation.every=8", "sample.every=0",
]  # fmt: skip
TOLERANCE = 2e-6


def leaving_at(*steps: int) -> list[dict[str, object]]:
    return [{"action": "term", "place": "step", "step": step, "rank": 0} for step in steps]


def trained(folder: Path, data: Path, worlds: list[int]) -> list[dict[str, float]]:
    """The rows of a run that begins at the first of these world sizes and goes on at the next, two steps each."""
    straight = {"name": "straight", "world": 1, "overrides": RUN, "plans": []}
    moved = {
        "name": "moved", "world": worlds[-1], "worlds": worlds, "overrides": RUN,
        "plans": leaving_at(*(2 * i for i in range(1, len(worlds)))),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(folder), str(data), json.dumps(straight), json.dumps(moved)],
        check=False, capture_output=True, text=True, timeout=600, env={**os.environ, "SORA_DEBUG": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    attempts = [json.loads(line) for line in (folder / "found.jsonl").read_text().splitlines()][1:]
    expected = [[EXIT_REQUEUE] * world for world in worlds[:-1]] + [[0] * worlds[-1]]
    assert [attempt["codes"] for attempt in attempts] == expected
    changed = [json.loads(line)["key"] for line in _lines(folder / "moved" / "changes.jsonl")]
    assert changed == [], "the same config at every size"
    return read_metrics(folder / "moved" / "metrics.jsonl")


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    "worlds", [[2, 1], pytest.param([4, 3, 2, 1], marks=pytest.mark.slow)], ids=["2-1", "4-3-2-1"]
)
def test_losses_are_those_of_one_rank(tmp_path: Path, finished_run: Path, worlds: list[int]):
    rows = trained(tmp_path, finished_run / "data", worlds)
    straight = read_metrics(tmp_path / "straight" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [row["step"] for row in straight] == list(range(1, 9))
    for moved, row in zip(rows, straight, strict=True):
        for key in ("train/loss", "train/grad_norm"):
            assert moved[key] == pytest.approx(row[key], rel=TOLERANCE), (row["step"], key)
        assert moved["train/clips"] == row["train/clips"]
    assert rows[-1]["val/loss"] == pytest.approx(straight[-1]["val/loss"], rel=TOLERANCE)
