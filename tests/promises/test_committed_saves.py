"""Promises 3 and 6 on two ranks: a save is whole or not there, whichever rank dies or fails, and both learn of it."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = Path(__file__).with_name("save_worker.py")
KILLED = -signal.SIGKILL
CELLS = {
    "undisturbed": ("", [0, 0], 3),
    "rank_1_fails": ("fail:after_shards:1", [0, 0], 1),
    "rank_0_fails": ("fail:before_manifest", [0, 0], 1),
    "rank_1_killed_after_copy": ("kill:after_copy:1", [0, KILLED], 1),
    "rank_1_killed_after_shards": ("kill:after_shards:1", [0, KILLED], 1),
    "both_killed_after_shards": ("kill:after_shards", [KILLED, KILLED], 1),
    "killed_after_manifest": ("kill:after_manifest", [KILLED, 0], 1),
    "killed_after_rename": ("kill:after_rename", [KILLED, 0], 2),
}
"""Name -> what happens in the second save, the ranks' exit codes, and the newest checkpoint then."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cells in one launch."""
    folder = tmp_path_factory.mktemp("saves")
    cells = [f"{name}={later}" for name, (later, _, _) in CELLS.items()]
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), *cells],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def read(folder: Path, cell: str, name: str) -> dict[str, Any]:
    return json.loads((folder / cell / f"{name}.json").read_text())


@pytest.mark.timeout(400)
@pytest.mark.parametrize("cell", CELLS)
def test_a_save_is_whole_or_not_there(found: Path, cell: str) -> None:
    _, codes, newest = CELLS[cell]
    ended = read(found, cell, "codes")
    assert ended["codes"] == codes and ended["after"] == [0, 0]
    assert ended["seconds"] < 60, "no rank waited for the end of a timeout"
    for rank in range(2):
        assert read(found, cell, f"1-{rank}") == {"newest": newest, "same": True, "state": newest}


def test_training_goes_on_behind_the_saves(found: Path) -> None:
    met = [read(found, "undisturbed", f"0-{rank}") for rank in range(2)]
    assert [row["said"] for row in met] == ["", ""]
    assert met[0]["steps"] == met[1]["steps"] > 10


@pytest.mark.parametrize(("cell", "failing"), [("rank_1_fails", 1), ("rank_0_fails", 0)])
def test_one_ranks_error_is_raised_on_both(found: Path, cell: str, failing: int) -> None:
    """At the same exchange; whoever's thread was done by then says why."""
    said = [read(found, cell, f"0-{rank}")["said"] for rank in range(2)]
    assert all(text.startswith("Fault: ") for text in said)
    told = ["cannot write the checkpoint" in text for text in said]
    assert any(told)
    if told[1 - failing]:
        assert said[1 - failing].startswith(f"Fault: rank {failing} cannot write")
    assert read(found, cell, "0-0")["steps"] == read(found, cell, "0-1")["steps"]


@pytest.mark.parametrize("cell", [cell for cell, (_, codes, _) in CELLS.items() if sum(codes) == KILLED])  # fmt: skip
def test_the_rank_that_lives_on_is_told(found: Path, cell: str) -> None:
    survivor = CELLS[cell][1].index(0)
    assert read(found, cell, f"0-{survivor}")["said"], "it did not go on as if nothing had been"
