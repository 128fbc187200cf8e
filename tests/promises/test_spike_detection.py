"""Promises 3, 5 and 6: a bad step is skipped by all ranks alike, a bad stretch is gone back behind, and nothing of it
is silent or inexact."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sentences import refuses, says
from spike_detection_worker import run

from sora_train import checkpoint as checkpoints
from sora_train.errors import Fault
from sora_train.monitoring.metrics import is_clocked, read_metrics

WORKER = Path(__file__).with_name("spike_detection_worker.py")
COUNTS = ("train/skipped", "train/rollbacks", "train/lost_clips", "train/samples_seen")
SMALL = [
    "optim=adamw", "optim.warmup_steps=2", "optim.lr=0.001", "validation.every=0", "data.cache=latents",
    "model.num_layers=1", "spike_detection.draw=false",
]  # fmt: skip

# Two micro-batches a step: an odd one is the second rank's. Steps are counted from 1, as in metrics.jsonl.
LONG = [
    *SMALL, "train.steps=11", "checkpoint.every=4", "spike_detection.warmup=3", "spike_detection.max_skips=2",
]  # fmt: skip
FAULTS = {"5": "nan", "8": "gradient", "13": "spike", "17": "nan", "18": "nan"}
"""Steps 3, 5 and 7 are bad, then 9 and 10: the run goes back from there to the checkpoint of step 4, not to that of
step 8, whose weights met both."""
SICK = {"sick": FAULTS, "whole": True, "overrides": LONG}
TOLD = {"sick": {"5": "nan"}, "whole": True, "jump": [4, 10], "overrides": LONG}
KILLED = {**SICK, "deaths": ["before the spike", "while it goes back", "after it went back"]}
MEMORY = {"sick": {"3": "memory"}, "overrides": LONG}
REASONS = {3: "non_finite", 5: "non_finite", 7: "loss_spike", 9: "non_finite", 10: "non_finite"}


def rows(run_dir: Path, *without: str) -> list[dict[str, float]]:
    found = read_metrics(run_dir / "metrics.jsonl")
    return [
        {key: value for key, value in row.items() if not is_clocked(key) and key not in without}
        for row in found
    ]


def digests(run_dir: Path, rank: int) -> list[str]:
    return json.loads((run_dir / f"digests-{rank}.json").read_text())


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose clips are rendered and encoded."""
    folder = tmp_path_factory.mktemp("stored") / "run"
    run({"overrides": [*SMALL, "train.steps=1", "checkpoint.every=0"]}, folder)
    return folder


def begun(folder: Path, stored: Path) -> Path:
    """A run folder that has clips and latents already."""
    for name in ("data", "cache"):
        shutil.copytree(stored / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, stored: Path) -> tuple[Path, str, int]:
    """The folder of both cells, what the launch said, and its exit code: the last cell ends it."""
    folder = tmp_path_factory.mktemp("cells")
    cells = [SICK, MEMORY]
    for number in range(len(cells)):
        begun(folder / f"cell-{number}", stored)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(WORKER), str(folder), *map(json.dumps, cells)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return folder, done.stdout + done.stderr, done.returncode


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, stored: Path) -> Path:
    """The same run in one process."""
    folder = begun(tmp_path_factory.mktemp("alone") / "run", stored)
    run(SICK, folder)
    return folder


@pytest.fixture
def live(tmp_path: Path, stored: Path) -> Callable:
    """`live(cell, "key=value")`: a run in this process, to its end; its folder."""

    def make(cell: dict, *overrides: str, name: str = "run") -> Path:
        folder = begun(tmp_path / name, stored)
        run({**cell, "overrides": [*cell["overrides"], *overrides]}, folder)
        return folder

    return make


@pytest.mark.timeout(400)
def test_what_one_rank_sees_all_ranks_skip(two_ranks: tuple, alone: Path) -> None:
    """A loss that is not a number on rank 1, an infinite gradient on rank 0, a hundredfold loss on rank 1."""
    run_dir = two_ranks[0] / "cell-0"
    found = rows(run_dir)
    assert [row["step"] for row in found] == list(range(1, 12)), two_ranks[1][-3000:]
    for folder, rank in ((run_dir, 0), (run_dir, 1), (alone, 0)):
        states = digests(folder, rank)
        unchanged = {step for step in range(2, 11) if states[step - 1] == states[step - 2]}
        assert unchanged == set(REASONS), (
            "weights, moments and averages as they were, and only there"
        )
    for row, reference in zip(found, rows(alone), strict=True):
        assert row == pytest.approx(reference, rel=1e-5)
    assert "train/loss" not in found[2], "JSON has no number for it"


@pytest.mark.timeout(400)
def test_a_skipped_step_is_written_down(two_ranks: tuple) -> None:
    run_dir = two_ranks[0] / "cell-0"
    found = [json.loads(file.read_text()) for file in sorted((run_dir / "spikes").glob("*.json"))]
    assert {spike["step"]: spike["reason"] for spike in found} == REASONS
    nan, gradient, spike = found[:3]
    assert (
        nan["loss"] == "nan" and gradient["loss"] < 10 and gradient["grad_norm"] in ("nan", "inf")
    )
    assert spike["loss"] > spike["loss_limit"] > 1
    ranks = [rank["micro_batches"][0] for rank in nan["ranks"]]
    assert ranks[0]["loss_sums"]["velocity"] > 0 and ranks[1]["loss_sums"]["velocity"] == "nan"
    clips = [clip for rank in ranks for clip in rank["clips"]]
    assert len(clips) == rows(run_dir)[2]["train/clips"]
    assert all(0 < clip["t"] < 1 and clip["key"] and clip["source"] for clip in clips)
    assert "step 3 skipped" in two_ranks[1]


@pytest.mark.timeout(400)
def test_a_run_that_went_back_is_one_told_to_leave_that_data_out(
    alone: Path, live: Callable
) -> None:
    told = live(TOLD)
    assert rows(alone, *COUNTS) == rows(told, *COUNTS)
    assert digests(alone, 0)[-7:] == digests(told, 0)[-7:]
    before, last = rows(alone)[3], rows(alone)[-1]
    assert (last["train/skipped"], last["train/rollbacks"]) == (5, 1)
    assert before["train/skipped"] == 1 and before["train/rollbacks"] == 0
    (done,) = [json.loads(line) for line in (alone / "rollbacks.jsonl").read_text().splitlines()]
    assert (done["from_step"], done["to_step"], done["left_out"]) == (10, 4, [4, 10])
    summary = json.loads((alone / "summary.json").read_text())
    assert (summary["skipped_steps"], summary["rollbacks"]) == (5, 1)
    trained = sum(row["train/clips"] for step, row in enumerate(rows(alone), 1) if step != 3)
    assert last["train/samples_seen"] == trained
    spikes = [json.loads(file.read_text()) for file in (alone / "spikes").glob("*.json")]
    in_bad_steps = sum(
        len(batch["clips"]) for spike in spikes for batch in spike["ranks"][0]["micro_batches"]
    )
    assert summary["lost_clips"] > in_bad_steps, "good steps were taken back too"


@pytest.mark.timeout(400)
def test_killed_as_it_goes_back_and_once_more_thereafter_it_is_the_same_run(
    alone: Path, live: Callable
) -> None:
    """And before that, so that what the judge had seen is in the checkpoint. As it goes back the decision is on disk
    and nothing of it is done: a checkpoint of the branch to be left is there."""
    killed = live(KILLED)
    assert json.loads((killed / "checkpoints-at-death.json").read_text()) == [4, 8]
    assert rows(killed) == rows(alone)
    assert digests(killed, 0) == digests(alone, 0)[-7:]
    assert (killed / "rollbacks.jsonl").read_text() == (alone / "rollbacks.jsonl").read_text()


@pytest.mark.timeout(400)
def test_out_of_memory_on_one_rank_ends_the_run_with_its_clips_named(two_ranks: tuple) -> None:
    folder, said, code = two_ranks
    assert code != 0
    says(said, "out of memory", "backward", "step 2", "rank 1")
    assert not (folder / "cell-1" / "summary.json").exists()
    assert not (folder / "cell-1" / "oom" / "rank-0.json").exists()
    report = json.loads((folder / "cell-1" / "oom" / "rank-1.json").read_text())
    assert report["bucket"] in ("1x32x32", "5x32x32") and report["layout"]["world_size"] == 2
    assert report["shape"]["clips"] == len(report["rows"]) and report["tokens"] > 0
    assert report["memory"]["resident"] > 1e7 and "allocate" in report["error"]


def test_a_skipped_step_is_drawn(live: Callable) -> None:
    cell = {"sick": {"1": "spike"}, "overrides": [*SMALL, "train.steps=1", "checkpoint.every=0"]}
    assert not (live(cell) / "spikes").exists(), "in warm-up a spike is a step like others"
    cell["sick"] = {"1": "nan"}
    drawn = live(cell, "spike_detection.draw=true", name="drawn") / "spikes"
    assert (drawn / "step-000001" / "rank-0.png").stat().st_size > 1000
    (spike,) = [json.loads(file.read_text()) for file in drawn.glob("*.json")]
    first, second = spike["ranks"][0]["micro_batches"]
    assert sum(clip["loss_sum"] for clip in first["clips"]) == pytest.approx(
        first["loss_sums"]["velocity"]
    )
    assert second["loss_sums"]["velocity"] == "nan"


def test_without_an_older_checkpoint_the_run_stops_and_says_so(
    live: Callable, tmp_path: Path
) -> None:
    with refuses(Fault, "2 to 3", "no checkpoint", "step 2", "spikes"):
        live({**SICK, "sick": {"2": "nan", "4": "nan"}}, "checkpoint.every=1")
    assert not (tmp_path / "run" / "rollbacks.jsonl").exists()


def test_after_so_many_times_the_run_stops(live: Callable, tmp_path: Path) -> None:
    """All data from step 5 on is bad: it goes back once, as it may, and meets the next."""
    with refuses(Fault, "4 to 5", "loss nan", "1 roll-back"):
        live(
            {**SICK, "sick": {str(index): "nan" for index in range(8, 40)}},
            "spike_detection.max_rollbacks=1", "checkpoint.every=3",
        )  # fmt: skip
    run_dir = tmp_path / "run"
    assert sorted(path.name for path in (run_dir / "spikes").iterdir()) == [
        "step-000004.r1.json", "step-000005.json", "step-000005.r1.json", "step-000006.json",
    ]  # fmt: skip
    assert [found.step for found in checkpoints.list_checkpoints(run_dir / "checkpoints")] == [3]
