"""`sora watch` tells a run's state from its folder, and reads only the ends of large files."""

import io
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sentences import refuses, says

from sora_train import cli
from sora_train.errors import UserError
from sora_train.monitoring.events import events
from sora_train.monitoring.status import TAIL_BYTES, read_status, runs_in, tail_rows
from sora_train.tools.watch.view import BLOCKS, page, sparkline

NOW = 1e9


def row(step: int, **more: float) -> str:
    found = {"step": step, "time": NOW - 1000 + step, "train/loss": 1.0 + 1 / step, **more}
    return json.dumps(found) + "\n"


def beat(run_dir: Path, **more: object) -> None:
    found = {
        "rank": 0,
        "host": "node1",
        "pid": 1,
        "step": 20,
        "phase": "compute",
        "beats": 9,
        "since": NOW - 2,
        "deadline": 600.0,
        "samples": [],
        "time": NOW - 1,
        **more,
    }
    (run_dir / "health").mkdir(exist_ok=True)
    (run_dir / "health/rank-00000.json").write_text(json.dumps(found))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep/run-1"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs/step-000000.yaml").write_text(
        "name: x\ntrain:\n  steps: 40\n  epochs: null\nema: {}\n"
    )
    parts = [{"step": 0, "ranks": 1, "config": "configs/step-000000.yaml"}]
    (folder / "run.json").write_text(json.dumps({"parts": parts}))
    names = {"train/step_seconds": 1.0, "train/by_t/0-0.2": 1.0, "train/by_t/0.8-1": 2.0}
    lines = [
        row(step, **names, **({"val/loss": 0.5} if step == 10 else {})) for step in range(1, 21)
    ]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def shown(run_dir: Path, width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(page(read_status(run_dir, NOW)))
    return file.getvalue()


def test_a_running_run(run_dir: Path):
    beat(run_dir)
    (run_dir / "checkpoints/step-000015").mkdir(parents=True)
    (run_dir / "checkpoints/step-000020.tmp").mkdir()
    found = read_status(run_dir, NOW)
    assert (found.state, found.step, found.steps) == ("running", 20, 40)
    assert found.eta == pytest.approx(20.0)
    assert found.checkpoint is not None and found.checkpoint[0] == 15
    assert found.last["val/loss"] == 0.5
    assert found.family("train/by_t/") == {"0-0.2": 1.0, "0.8-1": 2.0}
    assert found.trend is not None and found.trend < 0
    text = shown(run_dir)
    for part in ("RUNNING", "step 20 of 40", "50.0%", "ETA 20 s", "step 15", "0.8-1"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("width", [30, 80, 200])
def test_it_keeps_to_the_terminal(run_dir: Path, width: int):
    assert max(map(len, shown(run_dir, width).splitlines())) <= width


def stalled(run_dir: Path) -> None:
    beat(run_dir, since=NOW - 100)


def validating(run_dir: Path) -> None:
    beat(run_dir, phase="validation", since=NOW - 1000)


def killed(run_dir: Path) -> None:
    beat(run_dir, time=NOW - 500)


def failed(run_dir: Path) -> None:
    beat(run_dir)
    told = {"rank": 3, "phase": "data", "step": 20, "since": NOW, "error": "the disk\nis full"}
    (run_dir / "health/failed.json").write_text(json.dumps(told))


def hung(run_dir: Path) -> None:
    beat(run_dir, time=NOW - 500)
    (run_dir / "health/hang.txt").write_text("no progress for 600 s: rank 2 hangs\n\nstacks\n")


def finished(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text('{"steps": 20}')


def left(run_dir: Path) -> None:
    (run_dir / "summary.json").write_text('{"steps": 10}')  # of a shorter run before
    (run_dir / "checkpoints/step-000020").mkdir(parents=True)


@pytest.mark.parametrize(
    ("make", "state", "facts"),
    [
        (stalled, "stalled", ("99 s", "compute", "step 21", "node1")),
        (validating, "running", ("validation",)),
        (killed, "silent", ("500 s",)),
        (failed, "failed", ("rank 3", "data", "the disk is full")),
        (hung, "failed", ("rank 2 hangs",)),
        (finished, "finished", ("20 steps",)),
        (left, "left", ("exit code 75",)),
    ],
)
def test_states(
    run_dir: Path, make, state: str, facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    make(run_dir)
    found = read_status(run_dir, NOW)
    says(found.why, *facts)
    assert found.state == state
    # The clock is today's for the command: what lives by the time of a heartbeat is then silent.
    if state in ("failed", "finished", "left"):
        assert cli.run(["watch", str(run_dir), "--once"]) == int(state == "failed")
        assert state.upper() in capsys.readouterr().out


def test_a_folder_of_runs_is_a_table(run_dir: Path, capsys: pytest.CaptureFixture[str]):
    finished(run_dir)
    other = run_dir.parent / "run-2"
    other.mkdir()
    (other / "run.json").write_text("{}")
    assert runs_in(run_dir.parent) == [run_dir, other]
    assert cli.run(["watch", str(run_dir.parent), "--once"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("run-1" in line and "finished" in line and "20/40" in line for line in lines)
    assert any("run-2" in line and "new" in line for line in lines)


@pytest.mark.parametrize("make", [False, True])
def test_a_wrong_folder_is_one_sentence(tmp_path: Path, make: bool):
    folder = tmp_path / "nothing"
    if make:
        folder.mkdir()
    with refuses(UserError, "folder of a run"):
        cli.run(["watch", str(folder), "--once"])


@given(st.integers(1, 300), st.integers(10, 5000), st.booleans())
def test_the_tail_is_the_last_whole_rows(tmp_path_factory, count: int, size: int, cut: bool):
    path = tmp_path_factory.mktemp("tail") / "metrics.jsonl"
    lines = [row(step) for step in range(1, count + 1)]
    path.write_text("".join(lines)[: -3 if cut else None])
    found = [int(one["step"]) for one in tail_rows(path, size)]
    whole = list(range(1, count + (0 if cut else 1)))
    assert found == whole[len(whole) - len(found) :]
    # No more than one row that would have fitted is missing at each end.
    assert sum(len(lines[step - 1]) for step in found) >= min(size, path.stat().st_size) - 3 * max(
        map(len, lines)
    )


def test_a_large_file_costs_what_a_small_one_does(run_dir: Path):
    beat(run_dir)
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes()
    began = time.perf_counter()
    small = read_status(run_dir, NOW)
    small_seconds = time.perf_counter() - began
    with path.open("wb") as file:
        file.seek(2 << 30)  # sparse: only what is read takes time
        file.write(b"\n" + lines)
    began = time.perf_counter()
    large = read_status(run_dir, NOW)
    assert time.perf_counter() - began < small_seconds + 1.0
    assert large.rows == small.rows and large.last == small.last
    assert len(lines) < TAIL_BYTES


@given(st.lists(st.floats(-1e9, 1e9), max_size=100), st.integers(1, 50))
def test_sparklines(values: list[float], width: int):
    line = sparkline(values, width)
    assert len(line) == min(len(values), width) and set(line) <= set(BLOCKS)


def test_sparklines_rise_with_their_values():
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == BLOCKS


def test_events_are_read_from_what_a_run_leaves(run_dir: Path):
    starts = [
        {"time": NOW - 900, "step": 0, "ranks": 1},
        {"time": NOW - 500, "step": 8, "ranks": 2},
    ]
    (run_dir / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    (run_dir / "spikes").mkdir()
    spike = {"step": 12, "reason": "loss_spike", "loss": 9.5}
    (run_dir / "spikes/step-000012.json").write_text(json.dumps(spike))
    (run_dir / "spikes/step-000013.json").write_text('{"ste')  # being written
    (run_dir / "rollbacks.jsonl").write_text('{"number": 1, "from_step": 14, "to_step": 9}\n')
    failed(run_dir)
    found = events(run_dir, NOW)
    assert [(event.kind, event.step) for event in found] == [
        ("restart", 8),
        ("spike", 12),
        ("rollback", 14),
        ("failure", 20),
    ]
    assert "on 2 rank(s)" in found[0].text and "9.5" in found[1].text
    assert len({event.key for event in found}) == len(found)
    (run_dir / "health/failed.json").unlink()
    beat(run_dir, since=NOW - 400)
    assert events(run_dir, NOW)[-1].kind == "stall"
    beat(run_dir, since=NOW - 4)
    assert events(run_dir, NOW)[-1].kind == "rollback"
