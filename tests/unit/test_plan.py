"""Laws of the tape: what a step consumes, whoever asks and however often."""

import time

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses

from sora_train.data.sample import Bucket
from sora_train.data.tape.micro_batches import micro_batch_sizes
from sora_train.data.tape.tape import (
    Tape,
    imbalance,
    require_efficiency,
    row_costs,
    rows_for_rank,
    slot_efficiency,
)
from sora_train.errors import UserError

BUCKETS = [Bucket(1, 48, 48), Bucket(9, 48, 48), Bucket(9, 32, 64), Bucket(17, 48, 48)]


def tokens_of(bucket: Bucket) -> int:
    return ((bucket.frames - 1) // 4 + 1) * bucket.height * bucket.width // 256


def cost(tokens: int) -> float:
    return tokens + tokens**2 / 500


@st.composite
def tapes(draw: st.DrawFn) -> Tape:
    rows = draw(st.integers(1, 120))
    seed = draw(st.integers(0, 2**20))
    rng = np.random.default_rng(seed)
    bucket_of_row = rng.integers(-1, len(BUCKETS), rows)
    bucket_of_row[rng.integers(rows)] = 1
    return Tape(
        bucket_of_row,
        rng.integers(0, draw(st.integers(1, 12)), rows).astype(str).astype(object),
        BUCKETS,
        {bucket: draw(st.integers(1, 7)) for bucket in BUCKETS},
        seed=seed,
        group=draw(st.integers(1, 9)),
        window_shards=draw(st.integers(1, 4)),
        cost=lambda bucket: cost(tokens_of(bucket)),
    )


@given(tapes(), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_sample_exactly_once_an_epoch(tape: Tape, epoch: int):
    entries = [tape[epoch * tape.per_epoch + offset] for offset in range(tape.per_epoch)]
    rows = [row for entry in entries for row in entry.rows]
    assert sorted(rows) == np.flatnonzero(tape.bucket_of_row >= 0).tolist()
    assert {entry.epoch for entry in entries} == {epoch}
    for entry in entries:
        assert {tape.bucket_of(row) for row in entry.rows} == {entry.bucket}


@given(tapes())
@settings(max_examples=40, deadline=None)
def test_micro_batches_of_a_bucket_differ_by_one_clip_or_one_is_short(tape: Tape):
    for epoch in range(3):
        entries = [tape[epoch * tape.per_epoch + offset] for offset in range(tape.per_epoch)]
        # Images are cut to what the row of videos costs in which they have a seat.
        for bucket in BUCKETS[1:]:
            lengths = [len(entry.rows) for entry in entries if entry.bucket == bucket]
            short = [length for length in lengths if length < max(lengths)]
            assert len(short) <= 1 or min(lengths) == max(lengths) - 1
            expected = (tape.bucket_of_row == BUCKETS.index(bucket)).sum()
            assert sum(lengths) == expected


@given(tapes(), st.integers(0, 40), st.integers(1, 9), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_a_step_is_the_same_at_any_world_size(
    tape: Tape, step: int, micro_batches: int, world: int
):
    alone = rows_for_rank(tape, step, micro_batches, 0, 1)
    shares = [rows_for_rank(tape, step, micro_batches, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1, "every rank has as many slots as its peers"
    together = [entry for share in shares for entry in share if entry is not None]
    assert sorted(together, key=lambda entry: entry.index) == alone


@given(tapes(), st.lists(st.integers(0, 300), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None)
def test_seeking_gives_what_walking_gives(tape: Tape, indices: list[int]):
    sought = {index: tape[index] for index in indices}
    walked = [tape[index] for index in range(max(indices) + 1)]
    assert all(sought[index] == walked[index] for index in indices)


def test_epochs_differ_in_order_and_seeds_in_everything():
    def tape(seed: int) -> Tape:
        shards = np.array([str(row // 10) for row in range(400)], object)
        return Tape(np.arange(400) % 4, shards, BUCKETS, dict.fromkeys(BUCKETS, 5), seed=seed)

    def order(tape: Tape, epoch: int) -> list[tuple[int, ...]]:
        return [tape[epoch * tape.per_epoch + offset].rows for offset in range(tape.per_epoch)]

    assert order(tape(0), 0) != order(tape(0), 1)
    assert order(tape(0), 0) != order(tape(1), 0)
    assert order(tape(0), 1) == order(tape(0), 1)


def test_samples_are_shuffled_inside_windows_of_shards_only():
    shards = np.arange(1000) // 10
    tape = Tape(
        np.zeros(1000, int), shards, BUCKETS[:1], {BUCKETS[0]: 1}, seed=3, window_shards=5, group=1
    )
    rows = np.array([tape[index].rows[0] for index in range(1000)])
    windows = rows.reshape(20, 50) // 10
    assert all(len(set(window)) == 5 for window in windows), "five whole shards at a time"
    assert len({tuple(window) for window in windows}) == 20
    assert (np.diff(rows) == 1).mean() < 0.1


def test_groups_wait_less_than_two_percent_in_every_epoch():
    rng = np.random.default_rng(0)
    bucket_of_row = rng.choice(4, 20_000, p=[0.1, 0.4, 0.3, 0.2])
    counts = np.bincount(bucket_of_row).tolist()
    sizes = micro_batch_sizes(BUCKETS, counts, tokens_of, cost, "auto", 4096)
    tape = Tape(
        bucket_of_row,
        rng.integers(0, 100, 20_000),
        BUCKETS,
        sizes,
        seed=0,
        group=8,
        cost=lambda bucket: cost(tokens_of(bucket)),
    )
    costs = row_costs(tape, 8, 8, steps=4 * tape.per_epoch // 8)
    waits = imbalance(costs)
    # Only what an epoch leaves over may be uneven: a few groups, not a share of them.
    assert (waits > 0.05).sum() <= 4 * (len(BUCKETS) + 1), waits
    assert np.sort(waits)[: -4 * (len(BUCKETS) + 1)].mean() <= 0.02


def test_nothing_to_train_on_is_the_users_error():
    with refuses(UserError, "no clip", "bucket"):
        Tape(np.full(5, -1), np.arange(5), BUCKETS, {}, seed=0)


def test_a_million_rows_are_planned_in_seconds():
    rng = np.random.default_rng(0)
    rows = 1_000_000
    shards = np.array([f"shard-{number:06d}.tar" for number in range(1000)], object)[
        np.arange(rows) // 1000
    ]
    tape = Tape(rng.integers(0, 4, rows), shards, BUCKETS, dict.fromkeys(BUCKETS, 16), seed=0)
    began = time.process_time()
    assert len(tape[123_456_789].rows) > 0
    assert time.process_time() - began < 6
    began = time.process_time()
    for index in range(123_456_789, 123_456_889):
        tape[index]
    assert time.process_time() - began < 1.5


def test_idle_slots_are_told_and_refused():
    assert slot_efficiency(8, 4) == 1 and slot_efficiency(8, 3) == 8 / 9
    require_efficiency(8, 3, 0.8)
    with refuses(
        UserError,
        "micro_batches=8",
        "80%",
        "5 ranks",
        "4 ranks 100%",
        "6 ranks 67%",
        "8 ranks 100%",
    ):
        require_efficiency(8, 5, 0.9)


@given(tapes(), st.integers(1, 9), st.integers(1, 12), st.integers(0, 5), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_row_costs_are_those_of_the_ranks(
    tape: Tape, micro_batches: int, world: int, first: int, steps: int
):
    found = row_costs(tape, micro_batches, world, first_step=first, steps=steps)
    shares = [
        [rows_for_rank(tape, step, micro_batches, rank, world) for rank in range(world)]
        for step in range(first, first + steps)
    ]
    expected = [
        [tape.cost(entry) if entry else 0 for entry in row]
        for share in shares
        for row in zip(*share, strict=True)
    ]
    np.testing.assert_allclose(found, expected)
    assert ((imbalance(found) >= -1e-12) & (imbalance(found) < 1)).all()
