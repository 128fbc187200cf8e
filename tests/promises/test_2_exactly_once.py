"""Promise 2, exactly once: `used + dropped(reason) = total` for every epoch, at any world size, after any stop.

The whole data plane is run on real H.264 files of the shapes world, some of them damaged.
"""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sora_train.config import BucketClass, BucketsConfig, DataConfig
from sora_train.data.buckets import assign, build_buckets
from sora_train.data.index import open_source
from sora_train.data.loader import Loader
from sora_train.data.manifest import Manifest
from sora_train.data.plan import Tape, micro_batch_sizes
from sora_train.data.shapes_source import prepare_shapes
from sora_train.data.shards import read_bytes
from sora_train.errors import Fault

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
        data = read_bytes(made.root, made.shard[row], made.offset[row], made.length[row])
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
        pytest.raises(Fault, match="unreadable 3.*data.max_drop_fraction"),
    ):
        for step in range(steps):
            reader.step(step)
