"""Going back: load an earlier checkpoint in place and go on from it with other data.

Skipping leaves the weights as they are, so where step after step is bad it is the weights that are.
The run then takes up the newest checkpoint from before the first of those steps and reads on behind
them: the data from that checkpoint to here is left out (PaLM, arXiv:2204.02311, section 5.1).

RUN/rollbacks.jsonl is the record. A line is on disk before anything else changes, and a run killed
at any point after it goes on as one that was not: `discard_abandoned` removes the checkpoints of
the branch that was left, and `take_up` tells what the checkpoint gone back to cannot know.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_train import checkpoint as checkpoints
from sora_train.errors import Fault
from sora_train.training.spike_detector import SpikeCounters

if TYPE_CHECKING:
    from sora_train.training.trainer import Trainer

FILE_NAME = "rollbacks.jsonl"


@dataclass(frozen=True)
class Rollback:
    """The `number`-th time a run went back: from where, to which checkpoint, and to which step of the tape."""

    number: int
    from_step: int
    to_step: int
    left_out: tuple[int, int]
    """Steps of the tape that are not trained: the first, and the one behind the last."""
    tally: dict[str, int]


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """What is recorded; a last line cut short by a kill counts for nothing, since nothing followed it."""
    path = run_dir / FILE_NAME
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    lines = [json.loads(line) for line in whole.splitlines()]
    return [Rollback(**{**line, "left_out": tuple(line["left_out"])}) for line in lines]


def roll_back(trainer: "Trainer") -> None:
    """Go back behind the steps skipped last; every rank calls this, after a step.

    Raises:
        Fault: it was done `spike_detection.max_rollbacks` times, or there is no checkpoint to go to.
    """
    trainer.commit()
    with trainer.health.phase("save"):
        found, done = decide(trainer)
        state = found.state()
        if trainer.world.is_main:
            append(trainer.folder.path, done)
            discard_abandoned(trainer.folder.path)
        trainer.control.barrier()
        checkpoints.load(found, trainer.tensors(), trainer.control)
        trainer.engine.weights_changed()
        trainer.restore(state)
    # What that checkpoint still asked for was done when it was written.
    trainer.owed = []
    trainer.saved = (trainer.step, trainer.owed)
    if trainer.metrics:
        trainer.metrics.go_back(done.to_step)
        trainer.accounts.rolled_back(trainer.metrics)
    if trainer.world.is_main:
        print(said(done), flush=True)


def decide(trainer: "Trainer") -> tuple[checkpoints.Checkpoint, Rollback]:
    """Where to go, the same on every rank; raises as `roll_back` does."""
    judge = trainer.judge
    first_bad = trainer.step - judge.tally.in_a_row
    if judge.tally.rollbacks >= judge.cfg.max_rollbacks:
        raise Fault(gave_up(trainer, f"after {judge.tally.rollbacks} roll-back(s)"))
    found = newest_undamaged(trainer, first_bad)
    if found is None:
        raise Fault(gave_up(trainer, f"and no checkpoint is older than step {first_bad + 1}"))
    state = found.state()
    undone = trainer.samples_seen - state["samples_seen"]
    tally = SpikeCounters(
        skipped=judge.tally.skipped,
        lost_clips=judge.tally.lost_clips + undone,
        rollbacks=judge.tally.rollbacks + 1,
    )
    return found, Rollback(
        number=tally.rollbacks,
        from_step=trainer.step,
        to_step=found.step,
        left_out=(state["data_step"], trainer.data_step),
        tally=asdict(tally),
    )


def take_up(trainer: "Trainer", state: dict[str, Any]) -> None:
    """After a checkpoint's state was restored: what was decided after it was saved."""
    known = rollbacks_of(state)
    found = trainer.control.broadcast(
        read_rollbacks(trainer.folder.path) if trainer.world.is_main else None
    )
    assert isinstance(found, list)
    later = [rollback for rollback in found if rollback.number > known]
    if not later:
        return
    last = later[-1]
    if trainer.step > last.to_step:
        raise Fault(
            f"the checkpoint of step {trainer.step} belongs to a part of the run that was left by going back to step "
            f"{last.to_step}; remove it to go on from that step"
        )
    if trainer.step == last.to_step:
        trainer.data_step = last.left_out[1]
    # From before it the bad data are met again, with a count of how often that was in vain.
    trainer.judge.tally = SpikeCounters(**last.tally)


def discard_abandoned(run_dir: Path) -> None:
    """Remove the checkpoints of branches that were left. One process calls this."""
    rollbacks = read_rollbacks(run_dir)
    if not rollbacks:
        return
    for found in checkpoints.list_checkpoints(run_dir / "checkpoints"):
        try:
            known = rollbacks_of(found.state())
        except (OSError, ValueError):
            # A damaged one is told of when a checkpoint is chosen.
            continue
        later = [rollback for rollback in rollbacks if rollback.number > known]
        if any(found.step > rollback.to_step for rollback in later):
            shutil.rmtree(found.path)


def newest_undamaged(trainer: "Trainer", step: int) -> checkpoints.Checkpoint | None:
    """The newest checkpoint from before `step` steps were taken whose files match their digests.

    One of exactly `step` steps has the very weights that the next steps were bad with.
    """
    world, control = trainer.world, trainer.control
    listed = control.broadcast(earlier(trainer.folder.checkpoints, step) if world.is_main else None)
    assert isinstance(listed, list)
    for found in listed:
        why = checkpoints.damaged(found, part=world.rank, parts=world.size)
        if not any(control.gather_objects(why)):
            return found
    return None


def earlier(folder: Path, step: int) -> list[checkpoints.Checkpoint]:
    """The complete checkpoints from before a step, newest first."""
    found = [found for found in checkpoints.list_checkpoints(folder) if found.step < step]
    return found[::-1]


def rollbacks_of(state: dict[str, Any]) -> int:
    """How often the run had gone back when a checkpoint was saved."""
    return int(state.get("judge", {}).get("tally", {}).get("rollbacks", 0))


def append(run_dir: Path, rollback: Rollback) -> None:
    with (run_dir / FILE_NAME).open("a") as file:
        file.write(json.dumps(asdict(rollback)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def said(rollback: Rollback) -> str:
    first, behind = rollback.left_out
    return (
        f"rolled back from step {rollback.from_step} to the checkpoint of step {rollback.to_step}; the data of "
        f"steps {first + 1} to {behind} is left out (roll-back {rollback.number})"
    )


def gave_up(trainer: "Trainer", why: str) -> str:
    in_a_row, step, row = trainer.judge.tally.in_a_row, trainer.step, trainer.row
    return (
        f"steps {step - in_a_row + 1} to {step} were bad and skipped (the last: loss {row['train/loss']:.6g}, gradient "
        f"norm {row['train/grad_norm']:.6g}), {why}; the weights are those of before. Look at the clips in "
        f"{trainer.folder.path / 'spikes'}, lower optim.lr ({trainer.cfg.optim.lr:g}), or change spike_detection"
    )
