"""Promise 2, exactly once: `used + dropped(reason) = total` for every epoch, at any world size, after any stop.

The whole data plane is run on real H.264 files of the shapes world, some of them damaged.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses

from sora_train.config import BucketClass, BucketsConfig, DataConfig
from sora_train.data.index.folder import open_source
from sora_train.data.index.shapes_source import prepare_shapes
from sora_train.data.loader import Loader
from sora_train.data.manifest import Manifest
from sora_train.data.sample import Bucket
from sora_train.data.storage.ranges import read_bytes
from sora_train.data.tape.buckets import assign, build_buckets
from sora_train.data.tape.micro_batches import micro_batch_sizes
from sora_train.data.tape.tape import Tape, rows_for_rank
from sora_train.errors import Fault
from sora_train.training.trainer import Trainer

BUCKETS = BucketsConfig(
    fps=8,
    classes=(
        BucketClass(name="48px", pixels=2304, frames=(1, 9), aspect_ratios=("1:1", "2:1")),
        BucketClass(
            name="64px", pixels=4096, frames=(9, 17), aspect_ratios=("1:1",), probability=0.5
        ),
    ),
    max_crop=0.3,
)
MICRO_BATCHES = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Loose clips of the shapes world: a few broken from the start, one without a caption."""
    work = tmp_path_factory.mktemp("shapes")
    made = prepare_shapes(work, split="train", num_clips=60, seed=1)
    folder = work / "loose"
    folder.mkdir()
    for row in range(len(made)):
        data = read_bytes(made.path(row), made.offset[row], made.length[row])
        file = folder / f"{made.key[row]}.{'mp4' if made.kind[row] == 'video' else 'png'}"
        file.write_bytes(data if row not in (7, 20) else data[: len(data) // 3])
        if row != 30:
            file.with_suffix(".txt").write_text(made.caption[row])
    return folder


@pytest.fixture(scope="module")
def manifest(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return open_source(str(source), work_dir=tmp_path_factory.mktemp("work"))


def loader(manifest: Manifest, rank: int = 0, world_size: int = 1, **given: object) -> Loader:
    table = build_buckets(BUCKETS, temporal_factor=4, spatial_multiple=16)
    found = assign(manifest, table, BUCKETS, seed=0)
    buckets = [spec.bucket for spec in table]
    counts = np.bincount(
        found.bucket_of_row[found.bucket_of_row >= 0], minlength=len(buckets)
    ).tolist()
    sizes = micro_batch_sizes(
        buckets, counts, lambda b: b.frames * b.height * b.width // 256, float, "auto", 500
    )
    tape = Tape(
        found.bucket_of_row, manifest.shard, buckets, sizes, seed=0, group=4, window_shards=16
    )
    limit = given.pop("limit", 1.0)
    return Loader(
        manifest, tape, BUCKETS, DataConfig(max_drop_fraction=limit), seed=0, micro_batches=MICRO_BATCHES,
        rank=rank, world_size=world_size, reasons=found.reasons, **given,
    )  # fmt: skip


def consumed(manifest: Manifest, steps: range, rank: int = 0, world_size: int = 1) -> list[Counter]:
    """(epoch, row) of the clips of each step, and (epoch, row, reason) of those that failed."""
    with loader(manifest, rank, world_size) as reader:
        return [
            Counter(
                [(clip.epoch, clip.row) for batch in reader.step(step) for clip in batch.clips]
                + [
                    (b.micro_batch.epoch, f.row, f.reason)
                    for b in reader.step(step)
                    for f in b.failures
                ]
            )
            for step in steps
        ]


def test_used_and_dropped_are_all_in_every_epoch(manifest: Manifest):
    assert manifest.dropped() == {"unreadable": 2, "no_caption": 1}
    with loader(manifest) as reader:
        dropped = reader.quarantine.counts()
        per_epoch = reader.tape.per_epoch
    assert dropped["unreadable"] == 2 and dropped["no_caption"] == 1
    seen = sum(consumed(manifest, range(-(-2 * per_epoch // MICRO_BATCHES))), Counter())
    for epoch in (0, 1):
        used = [row for e, row in seen.elements() if e == epoch]
        assert len(used) == len(set(used)), "no sample twice in an epoch"
        assert len(used) + sum(dropped.values()) == len(manifest)


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_world_size_consumes_the_same(manifest: Manifest, world_size: int):
    steps = range(3, 5)
    alone = consumed(manifest, steps)
    shares = [consumed(manifest, steps, rank, world_size) for rank in range(world_size)]
    assert [sum(step, Counter()) for step in zip(*shares, strict=True)] == alone


def test_stopping_anywhere_and_going_on_consumes_the_same(manifest: Manifest):
    straight = consumed(manifest, range(6))
    assert consumed(manifest, range(3)) + consumed(manifest, range(3, 6)) == straight
    assert straight[0] != straight[4]


def test_a_clip_that_breaks_later_is_counted_not_replaced(
    manifest: Manifest, source: Path, tmp_path: Path
):
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    row = int(np.flatnonzero((manifest.drop_reason == "") & (manifest.kind == "video"))[0])
    file = broken / manifest.shard[row]
    file.write_bytes(b"\0" * file.stat().st_size)
    moved = manifest.select(np.arange(len(manifest)))
    moved.root = broken
    with loader(moved, run_dir=tmp_path) as reader:
        steps = -(-reader.tape.per_epoch // MICRO_BATCHES)
        batches = [
            b for step in range(steps) for b in reader.step(step) if b.micro_batch.epoch == 0
        ]
        used = [clip.row for batch in batches for clip in batch.clips]
        lost = reader.quarantine.counts()
    assert row not in used and sorted({f.row for b in batches for f in b.failures}) == [row]
    assert len(used) + sum(lost.values()) == len(manifest)
    with (
        loader(moved, limit=(sum(lost.values()) - 0.5) / len(manifest)) as reader,
        refuses(Fault, "unreadable 3", "data.max_drop_fraction"),
    ):
        for step in range(steps):
            reader.step(step)


# --- the same as laws of the tape, on random manifests, tables and world sizes ---


@st.composite
def tapes(draw: st.DrawFn) -> Tape:
    """A tape over up to 300 clips in up to 6 buckets (-1: none), in shards of any sizes, empty ones included."""
    number = draw(st.integers(1, 6))
    buckets = [Bucket(1 + 4 * index, 32, 32) for index in range(number)]
    per_shard = draw(
        st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda held: sum(held) > 0)
    )
    rows = sum(per_shard)
    bucket_of_row = np.array(
        draw(st.lists(st.integers(-1, number - 1), min_size=rows, max_size=rows))
    )
    bucket_of_row[draw(st.integers(0, rows - 1))] = 0
    counts = np.bincount(bucket_of_row[bucket_of_row >= 0], minlength=number).tolist()
    sizes = micro_batch_sizes(
        buckets, counts, lambda bucket: bucket.frames, lambda tokens: tokens + tokens**2 / 50,
        draw(st.one_of(st.just("auto"), st.integers(1, 9))), draw(st.integers(1, 200)),
    )  # fmt: skip
    return Tape(
        bucket_of_row, np.repeat(np.arange(len(per_shard)), per_shard), buckets, sizes,
        seed=draw(st.integers(0, 99)), group=draw(st.integers(1, 16)), window_shards=draw(st.integers(1, 8)),
        cost=lambda bucket: bucket.frames + bucket.frames**2 / 50,
    )  # fmt: skip


def of_step(tape: Tape, step: int, micro_batches: int, world: int) -> list[tuple]:
    """What all ranks together train in a step, in the order of the tape."""
    shares = [rows_for_rank(tape, step, micro_batches, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1, (
        "a rank with fewer slots would hang its peers"
    )
    found = [entry for share in shares for entry in share if entry is not None]
    return [
        (e.index, e.epoch, e.bucket, e.rows) for e in sorted(found, key=lambda entry: entry.index)
    ]


@given(tapes(), st.integers(1, 12), st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_conservation_on_any_manifest_table_and_world_size(
    tape: Tape, micro_batches: int, world: int
):
    steps = -(-2 * tape.per_epoch // micro_batches)
    seen = [entry for step in range(steps) for entry in of_step(tape, step, micro_batches, world)]
    for epoch in (0, 1):
        used = [row for _, e, _, rows in seen if e == epoch for row in rows]
        assert sorted(used) == np.flatnonzero(tape.bucket_of_row >= 0).tolist()
        assert len(used) + int((tape.bucket_of_row < 0).sum()) == len(tape.bucket_of_row)


@given(tapes(), st.integers(0, 30), st.integers(1, 12), st.integers(2, 40))
@settings(max_examples=80, deadline=None)
def test_the_tape_is_the_same_for_every_world_size(
    tape: Tape, step: int, micro_batches: int, world: int
):
    assert of_step(tape, step, micro_batches, world) == of_step(tape, step, micro_batches, 1)


@given(tapes(), st.integers(0, 60), st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_a_seek_gives_what_the_walk_gives(tape: Tape, step: int, micro_batches: int):
    sought = of_step(tape, step, micro_batches, 1)
    walked = [of_step(tape, earlier, micro_batches, 1) for earlier in range(step + 1)]
    assert walked[-1] == sought


def test_epoch_two_holds_the_same_clips_in_another_order():
    buckets = [Bucket(1, 32, 32), Bucket(5, 32, 32)]
    tape = Tape(
        np.arange(500) % 2, np.arange(500) // 50, buckets, dict.fromkeys(buckets, 4), seed=0
    )
    walk = [tape[index].rows for index in range(2 * tape.per_epoch)]
    first, second = walk[: tape.per_epoch], walk[tape.per_epoch :]
    assert first != second and sorted(map(len, first)) == sorted(map(len, second))
    assert sorted(sum(first, ())) == sorted(sum(second, ())) == list(range(500))


def test_shards_of_uneven_sizes_give_every_rank_the_same_number_of_steps():
    buckets = [Bucket(5, 32, 32)]
    shards = np.repeat(np.arange(4), [7, 3, 0, 11])
    tape = Tape(np.zeros(21, int), shards, buckets, {buckets[0]: 2}, seed=0)
    for epochs in range(1, 4):
        steps = -(-epochs * tape.per_epoch // 4)
        slots = [sum(len(rows_for_rank(tape, s, 4, rank, 4)) for s in range(steps)) for rank in range(4)]  # fmt: skip
        assert slots == [steps] * 4
    used = Counter(row for n in range(3 * tape.per_epoch) for row in tape[n].rows)
    assert used == dict.fromkeys(range(21), 3)


@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_fewer_clips_than_a_micro_batch_are_all_seen_equally_often(
    few: int, micro_batch: int, steps: int
):
    buckets = [Bucket(1, 32, 32), Bucket(5, 32, 32)]
    bucket_of_row = np.array([0] * 40 + [1] * few)
    sizes = micro_batch_sizes(
        buckets, [40, few], lambda bucket: bucket.frames, float, micro_batch, 0
    )
    assert sizes[buckets[1]] == min(micro_batch, few), (
        "the micro-batch shrinks, no clip is left out"
    )
    tape = Tape(bucket_of_row, np.zeros(len(bucket_of_row), int), buckets, sizes, seed=0)
    entries = [entry for step in range(steps) for entry in of_step(tape, step, 3, 2)]
    seen = Counter(row for *_, rows in entries for row in rows)
    times = [seen[row] for row in range(len(bucket_of_row))]
    assert max(times) - min(times) <= 1


def test_the_trainer_meets_every_clip_once_an_epoch(parity_config: Callable) -> None:
    """What the steps of two epochs read, counted: 24 clips, each twice."""
    met: list[tuple[int, int]] = []

    class Counting(Trainer):
        def read(self):
            batches, weights, error = super().read()
            met.extend((clip.epoch, clip.row) for batch in batches for clip in batch.clips)
            return batches, weights, error

    cfg = parity_config(
        "train.steps=0", "train.epochs=2", "validation.every=0", "checkpoint.every=0"
    )
    Counting(cfg).train()
    for epoch in (0, 1):
        assert sorted(row for at, row in met if at == epoch) == list(range(24))
