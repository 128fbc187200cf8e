"""Where a run goes on in its data: after a resume with other micro-batches a step, and after going back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.meta import CheckpointMeta, TrainState, read_meta
from sora_train.config.compose import compose
from sora_train.data.sample import Bucket
from sora_train.data.tape.mixture import Change, TapeSequence
from sora_train.data.tape.tape import Tape
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World
from sora_train.training.optim.ema_snapshots import remove_after
from sora_train.training.pipeline.data import TrainingData
from sora_train.training.resilience import resume, rollback
from sora_train.training.resilience.resume import find_place
from sora_train.training.resilience.spike_detector import SpikeCounters, SpikeDetector

CONTROL = ControlPlane(World(0, 1, 0, 1, torch.device("cpu")))
PER_EPOCH = 10


def data_of(micro_batches: int, seed: int = 0) -> TrainingData:
    """Twenty clips in ten micro-batches an epoch, and so many of these a step."""

    def make(change: Change, repeats: Any, epochs: int) -> Tape:
        bucket = Bucket(1, 32, 32)
        return Tape(np.zeros(20, int), np.zeros(20, int), [bucket], {bucket: 2}, seed=seed, group=1)

    data = TrainingData.__new__(TrainingData)
    data.tape, data.micro_batches = TapeSequence([Change(0, 20, (1.0,))], make), micro_batches
    assert data.tape.parts[0].per_epoch == PER_EPOCH
    return data


def meta_at(data_step: int, per_step: int) -> CheckpointMeta:
    """What a run of so many micro-batches a step writes after `data_step` of them."""
    written = data_of(per_step)
    return CheckpointMeta(
        train=TrainState(step=data_step, data_step=data_step),
        task="text_to_video",
        config={"train": {"micro_batches": per_step}},
        spec=None,
        epoch=written.epoch_at(data_step),
        plan=written.plan_digest(data_step * per_step),
    )


@pytest.mark.parametrize(
    ("per_step", "place", "over"),
    [(4, 3, 0), (6, 2, 0), (8, 2, 4), (5, 3, 3), (1, 12, 0), (12, 1, 0), (13, 1, 1)],
)
def test_no_micro_batch_is_trained_twice(per_step: int, place: int, over: int) -> None:
    """Three steps of four are done: the run goes on with micro-batch 12, or the first step behind it."""
    found, said = find_place(data_of(per_step), meta_at(3, 4), 3)
    assert found == place
    assert said.startswith(f"{over} micro-batch") if over else said == ""


def test_on_another_tape_the_epoch_that_was_begun_is_passed_over() -> None:
    """Twelve micro-batches are 1.2 epochs, so the run goes on with epoch 2, at micro-batch 20: step 4 of six each."""
    found, said = find_place(data_of(6, seed=1), meta_at(3, 4), 3)
    assert found == 4 and "epoch 2" in said and "80.0%" in said


def test_data_that_was_left_out_stays_left_out() -> None:
    """The checkpoint is of step 3 of the tape, and going back went on behind step 7."""
    assert find_place(data_of(4), meta_at(3, 4), 7) == (7, "")
    assert find_place(data_of(8), meta_at(3, 4), 7)[0] == 4


def test_going_back_counts_what_is_lost_and_how_often(finished_run: Path) -> None:
    """From step 4, skipped with step 3, to the checkpoint of step 1: that of step 2 has the weights that were bad."""
    folder: Any = SimpleNamespace(checkpoints=finished_run / "checkpoints")
    cfg = compose(["experiment=parity_tiny", "spike_detection.max_rollbacks=5"]).config
    spikes = SpikeDetector(cfg.spike_detection)
    spikes.counters = SpikeCounters(skipped=7, in_a_row=2, lost_clips=30, rollbacks=3)
    then = read_meta(checkpoints.find(finished_run, 1)).train
    assert then.samples_seen > 0
    now = replace(then, step=4, data_step=9, samples_seen=then.samples_seen + 5)
    target, found = rollback.decide(now, spikes, folder, CONTROL, cfg)
    assert target.step == found.to_step == 1
    assert (found.number, found.from_step, found.left_out) == (4, 4, (1, 9))
    assert found.tally == {"skipped": 7, "in_a_row": 0, "lost_clips": 35, "rollbacks": 4}
    state = replace(then)
    rollback.apply(found, state, spikes)
    assert (state.step, state.data_step, spikes.counters) == (1, 9, SpikeCounters(**found.tally))
    # From an earlier checkpoint the data are met again.
    state = replace(then, step=0, data_step=0)
    rollback.apply(found, state, spikes)
    assert state.data_step == 0


def test_snapshots_of_a_course_that_was_left_are_removed(
    finished_run: Path, tmp_path: Path
) -> None:
    """All that are of a later step than the one that is written anew, and none of an earlier one."""
    folder = tmp_path / "ema_snapshots"
    shutil.copytree(finished_run / "checkpoints", folder)
    assert [one.step for one in checkpoints.list_checkpoints(folder)] == [1, 2]
    remove_after(folder, 2)
    assert [one.step for one in checkpoints.list_checkpoints(folder)] == [1, 2]
    remove_after(folder, 1)
    assert [one.step for one in checkpoints.list_checkpoints(folder)] == [1]


def test_a_fork_takes_the_history_up_to_its_step(tmp_path: Path) -> None:
    """Rows of metrics and of changes alike, and none of what the other run did thereafter."""
    run, fork = tmp_path / "run", tmp_path / "fork"
    for folder in (run, fork):
        folder.mkdir()
    for name in ("metrics.jsonl", "changes.jsonl"):
        lines = [json.dumps({"step": step, "of": name}) + "\n" for step in (1, 2, 3, 4)]
        (run / name).write_text("".join(lines))
    folder: Any = SimpleNamespace(path=fork, metrics=fork / "metrics.jsonl")
    resume._take_history(run, folder, 2)
    for name in ("metrics.jsonl", "changes.jsonl"):
        taken = [json.loads(line) for line in (fork / name).read_text().splitlines()]
        assert taken == [{"step": step, "of": name} for step in (1, 2)]
