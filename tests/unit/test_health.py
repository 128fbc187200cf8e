"""Preemption, deadlines and the flags that all ranks share; what faults lead to is in tests/promises/test_faults.py."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from sentences import refuses, says

from sora_train import checkpoint as checkpoints
from sora_train.config import HealthConfig
from sora_train.errors import EXIT_REQUEUE, Fault, Preempted
from sora_train.monitoring.metrics import read_metrics
from sora_train.parallel.degrees import Degrees
from sora_train.runtime import preemption, watchdog
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.health import FIRST_STEPS, Health
from sora_train.runtime.preemption import PreemptionNotice, listening
from sora_train.runtime.watchdog import Beat, line_of, verdict
from sora_train.runtime.world import World
from sora_train.training.trainer import Trainer


class WithAnother(ControlPlane):
    """The control plane of two ranks, the other of which always adds `other`."""

    def __init__(self, other: Sequence[float]):
        super().__init__(World(0, 1, 0, 1, torch.device("cpu")))
        self.world, self.other = World(0, 2, 0, 2, torch.device("cpu")), list(other)

    def sum(self, values: Sequence[float]) -> list[float]:
        return [a + b for a, b in zip(values, self.other, strict=True)]

    def barrier(self) -> None:
        """Nobody is waited for."""


@pytest.fixture
def health(tmp_path: Path) -> Iterator[Health]:
    made = Health(HealthConfig(), ControlPlane(World(0, 1, 0, 1, torch.device("cpu"))), tmp_path)
    yield made
    made.stop()


# -- preemption ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_is_noted_inside_and_deadly_again_outside(number: signal.Signals):
    before = signal.getsignal(number)
    with listening():
        told = PreemptionNotice(0.0, 0.0, {})
        assert told.signalled == ""
        os.kill(os.getpid(), number)
        assert told.signalled == number.name
    assert signal.getsignal(number) is before and told.signalled == ""


def test_the_nearest_limit_counts_and_a_clock_that_is_set_does_not(monkeypatch: pytest.MonkeyPatch):
    end = str(int(time.time()) + 3600)
    assert not PreemptionNotice(0.0, 300.0, {preemption.SLURM_END: end}).late
    assert PreemptionNotice(0.0, 3700.0, {preemption.SLURM_END: end}).late
    assert PreemptionNotice(1.0, 120.0, {preemption.SLURM_END: end}).late, (
        "the run's own limit is nearer"
    )
    assert not PreemptionNotice(0.0, 300.0, {}).late
    assert not PreemptionNotice(0.0, 300.0, {preemption.SLURM_END: "UNLIMITED"}).late
    told = PreemptionNotice(0.0, 300.0, {preemption.SLURM_END: end})
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    assert not told.late


def test_a_run_whose_time_is_up_saves_and_goes_on_later(parity_config: Callable):
    hurried = ("health.time_limit_minutes=1", "health.leave_seconds=60", "validation.every=1")
    with refuses(Preempted, "time limit", "step 1", "saved") as told:
        Trainer(parity_config(*hurried)).train()
    assert told.value.exit_code == EXIT_REQUEUE
    cfg = parity_config("train.steps=2", "validation.every=1")
    assert [
        found.step for found in checkpoints.list_checkpoints(Path(cfg.run.dir) / "checkpoints")
    ] == [1]
    Trainer(cfg).train()
    rows = read_metrics(Path(cfg.run.dir) / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all("val/loss" in row for row in rows)


def test_a_lock_that_a_dead_run_has_left_counts_for_nothing(parity_config: Callable):
    cfg = parity_config("train.steps=1", "validation.every=0")
    Path(cfg.run.dir).mkdir()
    (Path(cfg.run.dir) / "lock").write_text("1")
    Trainer(cfg).close()


# -- what all ranks agree on --------------------------------------------------------------------------


def with_another(tmp_path: Path, other: Sequence[float]) -> Health:
    return Health(HealthConfig(), WithAnother(other), tmp_path)


def test_the_flags_of_one_rank_are_those_of_all(tmp_path: Path):
    """Behind the values: failed, signalled, late, step, slots."""
    health = with_another(tmp_path, [5.0, 0, 0, 0, 0, 2])
    assert health.exchange([1.0], slots=2) == [6.0] and health.leaving == ""
    health.stop()
    for flags, said in (([0, 1, 0], "a signal to another rank"), ([0, 0, 1], "the time limit")):
        health = with_another(tmp_path, [0.0, *flags, 0, 0])
        health.exchange([0.0])
        assert health.leaving == said
        with pytest.raises(Preempted, match=said):
            health.leave_if_preempted()
        health.stop()


def test_a_failure_of_one_rank_is_raised_on_all(tmp_path: Path):
    health = with_another(tmp_path, [0.0, 1, 0, 0, 0, 0])
    with pytest.raises(Fault, match=r"1 other rank\(s\) failed"):
        health.exchange([0.0])
    with pytest.raises(KeyError, match="mine"):
        health.exchange([0.0], KeyError("mine"))
    health.stop()


@pytest.mark.parametrize("other", [[0.0, 0, 0, 0, 1, 1], [0.0, 0, 0, 0, 0, 2]])
def test_ranks_that_are_not_at_the_same_place_stop(tmp_path: Path, other: list[float]):
    health = with_another(tmp_path, other)
    with refuses(Fault, "rank 0", "step 0", "1 micro-batch", "same job"):
        health.exchange([0.0], slots=1)
    health.stop()


# -- deadlines ----------------------------------------------------------------------------------------


def test_a_step_may_take_many_median_steps_but_never_less_than_its_floor(health: Health):
    cfg = health.cfg
    assert health.deadline("compute") == cfg.init_seconds, "the first steps compile"
    for step in range(FIRST_STEPS):
        health.stepped(1.0, step)
    assert health.deadline("compute") == health.deadline("loop") == cfg.step_seconds
    for step in range(100):
        health.stepped(1000.0, step)
    assert health.deadline("data") == cfg.step_factor * 1000
    assert health.deadline("idle") is None


def test_after_a_phase_the_one_around_it_goes_on(health: Health):
    with health.phase("validation", [4]):
        with health.phase("exchange"):
            assert health.watchdog._beat.phase == "exchange"
            assert health.watchdog._beat.samples == [4], "whose clips they still are"
        assert health.watchdog._beat.phase == "validation"
    assert health.watchdog._beat.phase == "idle"


def beat(
    rank: int, step: int, beats: int, phase: str = "exchange", **more: object
) -> dict[str, object]:
    place = {"rank": rank, "host": "h", "pid": 1, "step": step, "phase": phase, "beats": beats}
    return place | {"samples": [], "since": 0.0, "time": 1.0} | more


@pytest.mark.parametrize(
    ("beats", "answered", "facts"),
    [
        ([beat(0, 5, 9), beat(1, 5, 9)], {0}, ("rank 1", "does not answer")),
        ([beat(0, 5, 9), beat(1, 5, 8, "data", samples=[7, 3])], {0, 1},
         ("rank 1 in phase `data` of step 5", "furthest behind", "rows 7, 3")),
        ([beat(0, 4, 99), beat(1, 5, 2)], {0, 1}, ("rank 0", "furthest behind")),
        ([beat(0, 5, 9, "compute"), beat(1, 5, 9, "compute")], {0, 1}, ("all ranks",)),
        ([beat(0, 5, 9), None], {0}, ("rank 1 in phase `unknown`",)),
        ([beat(0, 5, 9, "data")], {0}, ("rank 0 in phase `data` of step 5", "hangs")),
    ],
)  # fmt: skip
def test_the_rank_that_is_waited_for_is_named(
    tmp_path: Path, beats: list, answered: set[int], facts: tuple[str, ...]
):
    late = Beat(0, "h", 1, 5, "exchange", 9, 0.0, 30.0, [])

    found = verdict(late, beats, answered, tmp_path / "hang.txt")
    says(found, "30 s", "phase `exchange`", "step 5", *facts)


def test_a_rank_is_told_with_its_place_in_the_mesh(tmp_path: Path):
    late, beats = Beat(0, "h", 1, 5, "exchange", 9, 0.0, 30.0, []), [beat(0, 5, 9), beat(1, 5, 8)]
    place_of = Degrees(dp_replicate=1, dp_shard=2, ulysses=1, ring=1).place_of
    found = verdict(late, beats, {0, 1}, tmp_path / "hang.txt", place_of)
    says(found, "rank 1", "exchange", "step 5", "host h", "process 1", "dp_shard 1")
    assert "process 1, dp_shard 1, rows" in line_of(1, beats[1], place_of(1))
    assert line_of(1, None, place_of(1)).endswith("a heartbeat, dp_shard 1")
    assert line_of(1, None, "").endswith("a heartbeat")


def test_what_an_earlier_attempt_left_is_cleared_but_for_its_report(tmp_path: Path):
    folder = tmp_path / watchdog.FOLDER
    folder.mkdir()
    for name in ("late", "failed.json", "rank-00001.json", "stacks-00000.txt", "hang.txt"):
        (folder / name).touch()
    watchdog.clear(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["hang.txt"]
