"""Rolling back: load an earlier checkpoint in place and go on from it with other data.

Skipping leaves the weights as they are, so where step after step is bad the weights are to blame.
The run then takes the newest checkpoint from before the first of those steps and reads on behind
them: the data from that checkpoint to here is left out (PaLM, arXiv:2204.02311, section 5.1).

RUN/rollbacks.jsonl is the record. A line is on disk before anything else changes, and a run killed
at any point after it goes on as one that was not: `discard_abandoned` removes the checkpoints of
the branch that was left, and `later` finds what the checkpoint gone back to cannot know.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.meta import TrainState, read_meta
from sora_train.config import Config
from sora_train.errors import Fault, UserError
from sora_train.monitoring.run_folder import RunFolder
from sora_train.runtime.control_plane import ControlPlane
from sora_train.training.resilience.spike_detector import SpikeCounters, SpikeDetector

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
    """The spike detector's counters from then on."""

    def __str__(self) -> str:
        first, behind = self.left_out
        return (
            f"rolled back from step {self.from_step} to the checkpoint of step {self.to_step}; the data of "
            f"steps {first + 1} to {behind} is left out (roll-back {self.number})"
        )


def decide(
    state: TrainState, spikes: SpikeDetector, folder: RunFolder, control: ControlPlane, cfg: Config
) -> tuple[checkpoints.Checkpoint, Rollback]:
    """Where to go back to, behind the steps skipped last; the same on every rank, and a collective.

    Raises:
        Fault: the run went back `spike_detection.max_rollbacks` times, or there is no checkpoint to go to.
    """
    counters = spikes.counters
    first_bad = state.step - counters.in_a_row
    if counters.rollbacks >= spikes.cfg.max_rollbacks:
        raise _gave_up(f"after {counters.rollbacks} roll-back(s)", state, counters, folder, cfg)
    target = newest_undamaged(folder.checkpoints, first_bad, control)
    if target is None:
        why = f"and no checkpoint is older than step {first_bad + 1}"
        raise _gave_up(why, state, counters, folder, cfg)
    then = read_meta(target).train
    after = SpikeCounters(
        skipped=counters.skipped,
        lost_clips=counters.lost_clips + state.samples_seen - then.samples_seen,
        rollbacks=counters.rollbacks + 1,
    )
    return target, Rollback(
        number=after.rollbacks,
        from_step=state.step,
        to_step=target.step,
        left_out=(then.data_step, state.data_step),
        tally=asdict(after),
    )


def record(rollback: Rollback, folder: RunFolder, control: ControlPlane) -> None:
    """Write a roll-back down before it is done, and remove the checkpoints that it leaves; a collective."""
    if control.world.is_main:
        with (folder.path / FILE_NAME).open("a") as file:
            file.write(json.dumps(asdict(rollback)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        discard_abandoned(folder.path)
    control.barrier()


def later(train: TrainState, folder: RunFolder, control: ControlPlane) -> Rollback | None:
    """The last roll-back that was decided after a checkpoint was saved; a collective.

    Raises:
        Fault: the checkpoint belongs to a branch that was left.
    """
    recorded = control.broadcast(read_rollbacks(folder.path) if control.world.is_main else None)
    assert isinstance(recorded, list)
    unknown = [one for one in recorded if one.number > rollbacks_of(train)]
    if not unknown:
        return None
    last: Rollback = unknown[-1]
    if train.step > last.to_step:
        raise Fault(
            f"the checkpoint of step {train.step} belongs to a part of the run that was left by going back to step "
            f"{last.to_step}; remove it to go on from that step"
        )
    return last


def apply(rollback: Rollback, state: TrainState, spikes: SpikeDetector) -> None:
    """Go on behind the data that a roll-back leaves out."""
    if state.step == rollback.to_step:
        state.data_step = rollback.left_out[1]
    # From before it the bad data are met again, with a count of how often that was in vain.
    spikes.counters = SpikeCounters(**rollback.tally)


def read_rollbacks(run_dir: Path) -> list[Rollback]:
    """What is recorded; a last line cut short by a kill counts for nothing, since nothing followed it."""
    path = run_dir / FILE_NAME
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    lines = [json.loads(line) for line in whole.splitlines()]
    return [Rollback(**{**line, "left_out": tuple(line["left_out"])}) for line in lines]


def discard_abandoned(run_dir: Path) -> None:
    """Remove the checkpoints of branches that were left. One process calls this."""
    rollbacks = read_rollbacks(run_dir)
    if not rollbacks:
        return
    for candidate in checkpoints.list_checkpoints(run_dir / "checkpoints"):
        try:
            known = rollbacks_of(read_meta(candidate).train)
        except (OSError, ValueError, UserError):
            # A damaged one is reported when a checkpoint is chosen.
            continue
        unknown = [rollback for rollback in rollbacks if rollback.number > known]
        if any(candidate.step > rollback.to_step for rollback in unknown):
            shutil.rmtree(candidate.path)


def newest_undamaged(
    folder: Path, step: int, control: ControlPlane
) -> checkpoints.Checkpoint | None:
    """The newest checkpoint from before `step` steps were taken whose files match their digests; a collective.

    One of exactly `step` steps has the very weights that the next steps were bad with.
    """
    world = control.world
    listed = control.broadcast(earlier(folder, step) if world.is_main else None)
    assert isinstance(listed, list)
    for candidate in listed:
        damage = checkpoints.damaged(candidate, part=world.rank, parts=world.size)
        if not any(control.gather_objects(damage)):
            return candidate
    return None


def earlier(folder: Path, step: int) -> list[checkpoints.Checkpoint]:
    """The complete checkpoints from before a step, newest first."""
    listed = checkpoints.list_checkpoints(folder)
    return [checkpoint for checkpoint in listed if checkpoint.step < step][::-1]


def rollbacks_of(train: TrainState) -> int:
    """How often the run had gone back when a checkpoint was saved."""
    return int(train.spikes.get("tally", {}).get("rollbacks", 0))


def _gave_up(
    why: str, state: TrainState, counters: SpikeCounters, folder: RunFolder, cfg: Config
) -> Fault:
    in_a_row, step, row = counters.in_a_row, state.step, state.row
    return Fault(
        f"steps {step - in_a_row + 1} to {step} were bad and skipped (the last: loss {row['train/loss']:.6g}, gradient "
        f"norm {row['train/grad_norm']:.6g}), {why}; the weights are those of before. Look at the clips in "
        f"{folder.path / 'spikes'}, lower optim.lr ({cfg.optim.lr:g}), or change spike_detection"
    )
