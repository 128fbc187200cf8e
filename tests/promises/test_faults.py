"""Promises 3 and 6 under faults made on purpose: what each leads to, and that the run goes on as if nothing had been.

One process imports torch and forks every rank of every cell.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sentences import says

from benchmarks import chaos
from sora_train.errors import EXIT_FAULT, EXIT_REQUEUE

pytestmark = pytest.mark.timeout(900)
DRIVER = Path(__file__).with_name("faults_driver.py")
SHORT = ["train.steps=9", "checkpoint.every=3", "validation.every=4", "sample.every=5"]
# A step takes a few hundredths of a second here; a busy machine a few tenths.
DEADLINE = 4.0
HURRIED = [
    *SHORT,
    f"health.step_seconds={DEADLINE:g}",
    "health.step_factor=1",
    "health.heartbeat_seconds=0.5",
    "validation.every=0",
    "sample.every=0",
]

Found = dict[str, list[dict[str, Any]]]


def cell(name: str, world: int, *plans: tuple[str, str, int, int], **more: Any) -> dict[str, Any]:
    """A cell with one attempt a plan (action, place, step, rank)."""
    keys = ("action", "place", "step", "rank")
    return {
        "name": name, "world": world, "overrides": SHORT,
        "plans": [dict(zip(keys, plan, strict=True)) for plan in plans], **more,
    }  # fmt: skip


KILLS = [
    ("kill", "data", 2, 0), ("kill", "compute", 4, 0), ("kill", "validation", 4, 0), ("kill", "samples", 5, 0),
    ("kill", "save", 6, 0), ("kill", "step", 8, 0),
]  # fmt: skip
TOLD = [
    ("term", "step", 2, 1),
    ("term", "validation", 4, 1),
    ("term", "samples", 5, 0),
    ("term", "save", 6, 1),
]
CELLS = [
    cell("straight-1", 1),
    cell("straight-2", 2),
    cell("killed-1", 1, *KILLS[2:5]),
    cell("killed-2", 2, ("kill", "compute", 4, 1)),
    cell("told", 2, *TOLD[1:3]),
    cell("stopped", 2, ("stop", "step", 5, 1), restart=False, overrides=HURRIED, others_seconds=2.0),
    cell("asleep", 2, ("sleep", "data", 5, 1), restart=False, overrides=HURRIED),
    cell("spinning", 1, ("spin", "compute", 5, 0), restart=False, overrides=HURRIED),
    cell("failing", 2, ("raise", "compute", 5, 1), restart=False),
]  # fmt: skip
MORE_CELLS = [
    cell("straight-1", 1),
    cell("straight-2", 2),
    cell("killed-1", 1, *KILLS),
    cell("killed-2", 2, ("kill", "compute", 4, 1), ("kill", "samples", 5, 1)),
    cell("told", 2, *TOLD),
    cell("failing", 2, ("raise", "data", 5, 1), restart=False),
]
"""More of the same kinds, for the long form."""


LONG = pytest.param(MORE_CELLS, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[CELLS, LONG], ids=["short", "long"])
def cells(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return request.param


@pytest.fixture(scope="module")
def folder(
    cells: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, finished_run: Path
) -> Path:
    made = tmp_path_factory.mktemp("faults")
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(made), str(finished_run / "data"), *map(json.dumps, cells)],
        check=False, capture_output=True, text=True, timeout=900, env={**os.environ, "SORA_DEBUG": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    attempts: Found = {}
    for line in (folder / "found.jsonl").read_text().splitlines():
        row = json.loads(line)
        attempts.setdefault(row["cell"], []).append(row)
    return attempts


def same_as_straight(folder: Path, name: str, world: int) -> list[str]:
    straight, disturbed = (
        chaos.outcome(folder / run, world) for run in (f"straight-{world}", name)
    )
    assert len(straight["numbers"]) == 9 and len(straight["tensors"]) > 100
    return chaos.differences(straight, disturbed)


@pytest.mark.parametrize(("name", "world"), [("killed-1", 1), ("killed-2", 2)])
def test_a_run_that_is_killed_and_started_again_is_the_straight_one(
    cells: list[dict[str, Any]], folder: Path, found: Found, name: str, world: int
):
    *killed, last = found[name]
    plans = next(one for one in cells if one["name"] == name)["plans"]
    assert [
        attempt["codes"][plan["rank"]] for attempt, plan in zip(killed, plans, strict=True)
    ] == [-9] * len(plans)
    assert not any(attempt["hung"] for attempt in killed)
    assert all(code != 0 for attempt in killed for code in attempt["codes"]), (
        "the other rank does not end with 0"
    )
    commits = [attempt["newest"] for attempt in found[name]]
    assert commits == sorted(commits) and last["codes"] == [0] * world
    assert same_as_straight(folder, name, world) == []


def test_a_rank_that_is_told_to_leave_takes_all_along_and_nothing_is_lost(
    cells: list[dict[str, Any]], folder: Path, found: Found
):
    *told, last = found["told"]
    plans = next(one for one in cells if one["name"] == "told")["plans"]
    assert [attempt["codes"] for attempt in told] == [[EXIT_REQUEUE] * 2] * len(plans)
    for attempt, plan in zip(told, plans, strict=True):
        # Told in the loop of a step: after it, or after the next one if its exchange had been.
        after = [plan["step"], plan["step"] + (plan["place"] == "step")]
        assert plan["place"] == "save" or attempt["newest"] in after
    assert all("is saved in" in attempt["said"][0] for attempt in told)
    assert last["codes"] == [0, 0]
    assert same_as_straight(folder, "told", 2) == []


@pytest.mark.parametrize("cells", [CELLS], ids=["short"], indirect=True)
def test_a_rank_that_is_stopped_is_found_and_named(found: Found):
    (attempt,) = found["stopped"]
    assert attempt["codes"][0] == EXIT_FAULT and attempt["hung"], (
        "the stopped rank itself had to be killed"
    )
    said = attempt["said"][0].splitlines()[-1]
    says(said, "no progress")
    assert "rank 1 in phase" in said and "does not answer" in said
    assert "of step 5" in said and "stacks of rank 0" in attempt["report"]


@pytest.mark.parametrize("cells", [CELLS], ids=["short"], indirect=True)
def test_a_rank_that_hangs_over_its_data_is_found_with_its_clips(found: Found):
    (attempt,) = found["asleep"]
    assert attempt["codes"] == [EXIT_FAULT] * 2 and not attempt["hung"]
    said = "".join(attempt["said"])
    says(said, "rank 1", "data", "step 5", "furthest behind")
    assert "decode process" in attempt["report"], "the decoders' stacks too"
    assert "in strike" in attempt["report"], "and where that rank stands in the code"


@pytest.mark.parametrize("cells", [CELLS], ids=["short"], indirect=True)
def test_a_rank_that_holds_the_interpreter_lock_is_ended_with_its_stack(folder: Path, found: Found):
    (attempt,) = found["spinning"]
    assert attempt["codes"] == [EXIT_FAULT] and not attempt["hung"]
    stacks = (folder / "spinning" / "health" / "stacks-00000.txt").read_text()
    assert "Timeout" in stacks and "in strike" in stacks


def test_a_rank_that_fails_ends_the_others_at_once(found: Found):
    (attempt,) = found["failing"]
    assert attempt["codes"] == [EXIT_FAULT] * 2 and not attempt["hung"] and attempt["seconds"] < 80
    assert "error: this rank was told to fail" in attempt["said"][1]
    assert "failed" in attempt["said"][0] and "internal fault" not in attempt["said"][0]
