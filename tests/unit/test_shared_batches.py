"""Ranks that share a micro-batch: what one of them fails on is lost for all, and errors keep nobody waiting."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from sentences import refuses

from sora_train.data.sample import Bucket, Clip, ClipBatch, Failure, MicroBatch
from sora_train.errors import Fault
from sora_train.training.pipeline.shared_batches import read_together, together

ENTRY = MicroBatch(0, Bucket(1, 16, 16), 0, (5, 6, 7), (0, 0, 0))


class Peer:
    """The control plane of one of two ranks, the other of which tells what it is given here."""

    def __init__(self, *answers: Any):
        self.world = SimpleNamespace(cp=2, cp_rank=0, dp_rank=3)
        self.answers = list(answers)

    def gather_from_peers(self, value: object) -> list[Any]:
        answer = self.answers.pop(0)
        return [value, answer(value) if callable(answer) else answer]


def same(value: Any) -> Any:
    return value


def batch(*failed: int) -> ClipBatch:
    clips = [Clip(row, 0, None, None, 8.0, "", "") for row in ENTRY.rows if row not in failed]
    failures = [Failure(row, "timeout", f"of {row}") for row in failed]
    return ClipBatch(ENTRY, clips, failures, float(len(clips)))


def loses(*rows: int) -> Callable[[list], list]:
    return lambda value: [[(batch(*rows).failures, set())]]


@pytest.mark.parametrize(("mine", "other"), [((), (6,)), ((6,), ()), ((5,), (7,)), ((5, 6), (6,))])
def test_what_any_rank_fails_on_is_lost_for_all(mine: tuple[int, ...], other: tuple[int, ...]):
    noted: list[int] = []
    (found,) = read_together(
        lambda: [batch(*mine)],
        lambda failure: noted.append(failure.row),
        None,
        Peer(loses(*other)),  # type: ignore[arg-type]
    )
    lost = sorted({*mine, *other})
    assert [failure.row for failure in found.failures] == lost
    assert [clip.row for clip in found.clips] == [row for row in ENTRY.rows if row not in lost]
    assert found.weight == len(found.clips)
    assert noted == sorted({*other} - {*mine}), "its own failures are recorded where they happen"


class Filler:
    """Encodes clips of rows that are not even."""

    def lacks(self, clip: Clip) -> bool:
        return clip.row % 2 == 1 and clip.latents is None

    def with_latents(self, clip: Clip) -> Clip:
        return replace(clip, latents=f"latents of {clip.row}")  # type: ignore[arg-type]

    def with_text(self, clip: Clip) -> Clip:
        return clip


def test_each_clip_is_encoded_by_one_of_the_ranks_for_all():
    told = {(0, 1): {"latents": "of the other", "pixels": None}}
    (found,) = read_together(
        lambda: [batch()],
        print,
        Filler(),
        # The other has met row 6 in no cache, which this one has.
        Peer(lambda value: [[([], {6})]], lambda value: [told]),  # type: ignore[arg-type]
    )
    assert [clip.latents for clip in found.clips] == [
        "latents of 5",
        "of the other",
        "latents of 7",
    ]


def test_a_rank_that_fails_keeps_its_error_and_the_others_hear_of_it():
    def fails() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        together(fails, Peer(same))  # type: ignore[arg-type]
    with refuses(Fault, "rank 7", "failed"):
        together(lambda: None, Peer([]))  # type: ignore[arg-type]


def test_too_many_losses_are_told_before_the_others_wait_for_what_is_encoded():
    def refuses(failure: Failure) -> None:
        raise Fault("too many")

    other = Peer(lambda value: [[([batch(5).failures[0]], {6})]], same)
    with pytest.raises(Fault, match="too many"):
        read_together(lambda: [batch()], refuses, Filler(), other)  # type: ignore[arg-type]
    assert not other.answers, "it took part in the second gathering"
