"""Goodput: the parts are the whole, and no second counts twice, however often the run is killed."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_train.monitoring.goodput import PARTS, Goodput, note_start, seconds_of, starts

SECONDS = st.floats(0, 1e4)
STEPS = st.lists(st.tuples(SECONDS, st.floats(0, 1), st.booleans()), max_size=8)
BEGAN = 1e6


def shares(row: dict[str, float]) -> float:
    return sum(value for name, value in row.items() if name != "goodput/seconds")


@given(
    STEPS,
    st.dictionaries(st.sampled_from(["save", "validation", "samples", "data"]), SECONDS),
    SECONDS,
)
def test_the_parts_are_the_whole(steps, phases, idle):
    book = Goodput(BEGAN)
    for seconds, wait, counts in steps:
        book.step(seconds, wait * seconds, counts=counts)
    book.phases(phases)
    book.phases(phases)  # totals, not additions
    spent = sum(seconds for seconds, _, _ in steps)
    spent += sum(phases.get(name, 0.0) for name in ("save", "validation", "samples"))
    row = book.row(BEGAN + spent + idle)
    assert shares(row) == pytest.approx(1.0)
    assert row["goodput/seconds"] == pytest.approx(spent + idle, abs=1e-6)
    good = sum(seconds * (1 - wait) for seconds, wait, counts in steps if counts)
    assert row["goodput/productive"] * row["goodput/seconds"] == pytest.approx(good, abs=1e-6)


@given(st.integers(1, 9), st.integers(0, 9), st.floats(0, 100))
def test_a_restart_counts_replayed_steps_once(done, kept, pause):
    """A run of steps of 2 s is killed after `done` and goes on from `kept`, to 12: these count, the rest is wasted."""
    kept = min(kept, done)
    first, rows, now = Goodput(BEGAN), [], BEGAN
    for _ in range(done):
        first.step(2.0, 0.5, counts=True)
        now += 2.0
        rows.append(first.row(now))
    again = Goodput(BEGAN)
    again.go_on(rows[kept - 1] if kept else None, rows[-1] if kept < done else None)
    now += pause
    for _ in range(12 - kept):
        again.step(2.0, 0.5, counts=True)
        now += 2.0
    found = seconds_of(again.row(now))
    assert found["productive"] == pytest.approx(12 * 1.5)
    assert found["data_wait"] == pytest.approx(12 * 0.5)
    assert found["wasted"] == pytest.approx(2.0 * (done - kept), abs=1e-6)
    assert again.row(now)["goodput/other"] * (now - BEGAN) == pytest.approx(pause, abs=1e-5)


def test_a_roll_back_throws_away_what_came_after():
    book = Goodput(BEGAN)
    book.step(3.0, 0.0, counts=True)
    row = book.row(BEGAN + 3)
    book.step(5.0, 1.0, counts=True)
    book.step(2.0, 0.0, counts=False)
    book.go_back(row)
    assert book.seconds == {**dict.fromkeys(PARTS, 0.0), "productive": 3.0, "wasted": 7.0}


def test_starts_are_kept_with_their_code(tmp_path: Path):
    assert starts(tmp_path) == []
    assert note_start(tmp_path, 0, 2, 100.0) == 100.0
    assert note_start(tmp_path, 7, 1, 200.0) == 100.0
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"time": 300, "st')  # cut short by a kill
    found = starts(tmp_path)
    assert [(start["time"], start["step"], start["ranks"]) for start in found] == [
        (100, 0, 2),
        (200, 7, 1),
    ]
    assert len(found[0]["code"]["package"]) == 64
    assert json.loads((tmp_path / "starts.jsonl").read_text().splitlines()[0])["code"]["package"]
