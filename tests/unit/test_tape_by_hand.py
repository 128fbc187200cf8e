"""A tape of two parts whose every number can be counted on fingers: 20 clips by twos, and from micro-batch 25 on 30."""

from collections.abc import Sequence

import numpy as np
import pytest

from sora_train.data.sample import Bucket
from sora_train.data.tape.mixture import Change, TapeSequence
from sora_train.data.tape.tape import SourceRepeats, Tape

BUCKET = Bucket(1, 32, 32)
CHANGE = 25
"""Two epochs of ten micro-batches are done there, and half of the third."""


@pytest.fixture(scope="module")
def tape() -> TapeSequence:
    def make(change: Change, repeats: Sequence[SourceRepeats], epochs: int) -> Tape:
        of_row = np.where(np.arange(30) < change.rows, 0, -1)
        return Tape(
            of_row, np.arange(30) // 10, [BUCKET], {BUCKET: 2}, seed=0, group=1, cost=lambda _: 3.0,
            mix=repeats, first=change.first, first_epoch=epochs,
        )  # fmt: skip

    return TapeSequence([Change(0, 20, (1.0,)), Change(CHANGE, 30, (1.0,))], make)


@pytest.mark.parametrize(
    ("index", "epoch"), [(0, 0), (9, 0), (10, 1), (24, 2), (25, 3), (39, 3), (40, 4), (55, 5)]
)
def test_a_micro_batch_and_its_clips_are_of_this_epoch(
    tape: TapeSequence, index: int, epoch: int
) -> None:
    """The epoch that was broken off counts as one that was begun: its draws are not made again."""
    found = tape[index]
    assert (found.index, found.epoch, found.epochs) == (index, epoch, (epoch, epoch))


def test_clips_come_once_an_epoch_and_the_new_ones_from_the_change_on(tape: TapeSequence) -> None:
    def rows(first: int, last: int) -> list[int]:
        return sorted(row for index in range(first, last) for row in tape[index].rows)

    assert rows(0, 10) == rows(10, 20) == list(range(20))
    assert len(set(rows(20, 25))) == 10 and max(rows(20, 25)) < 20
    assert rows(25, 40) == rows(40, 55) == list(range(30))


@pytest.mark.parametrize(
    ("index", "epochs"), [(0, 0.0), (12, 1.2), (24, 2.4), (25, 3.0), (31, 3.4), (40, 4.0)]
)
def test_epochs_before(tape: TapeSequence, index: int, epochs: float) -> None:
    assert tape.epochs_before(index) == pytest.approx(epochs)


@pytest.mark.parametrize(
    ("epochs", "index"), [(0.0, 0), (1.0, 10), (1.25, 13), (2.5, 25), (3.0, 25), (3.5, 33), (4.0, 40)]
)  # fmt: skip
def test_index_after(tape: TapeSequence, epochs: float, index: int) -> None:
    """Whatever is begun is finished: a part of a micro-batch needs the whole of it."""
    assert tape.index_after(epochs) == index


@pytest.mark.parametrize(
    ("index", "end"), [(0, 0), (1, 10), (10, 10), (21, 25), (25, 25), (26, 40), (41, 55)]
)
def test_end_of_epoch(tape: TapeSequence, index: int, end: int) -> None:
    assert tape.end_of_epoch(index) == end


def test_costs_are_those_of_the_clips(tape: TapeSequence) -> None:
    """Two clips of cost 3 in each micro-batch, over the end of an epoch and of a part."""
    assert tape.costs(8, 20).tolist() == [6.0] * 20
    assert tape.cost(tape[24]) == tape.cost(tape[25]) == 6.0
