"""Which moments and which part of its frame a clip shows in each of its epochs: against the recipe of the keys, written
out here, and against frames that say their own number."""

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
from clip_files import number_of, write_clip

from sora_train.config import BucketClass, BucketsConfig, DataConfig
from sora_train.data.index.folder import open_source
from sora_train.data.loader import Loader
from sora_train.data.sample import Bucket
from sora_train.data.tape.tape import Tape, rows_for_rank

SEED = 4
BUCKET = Bucket(5, 32, 32)
BUCKETS = BucketsConfig(
    fps=6, classes=(BucketClass(name="c", pixels=1024, frames=(5,), aspect_ratios=("1:1",)),)
)
CLIPS, UPRIGHT, FRAMES, RATE = 7, 6, 40, 12.0


def keyed(stream: str, *parts: int | str) -> float:
    """BLAKE2b of the key's parts with unit separators between, as a number in [0, 1)."""
    text = "\x1f".join(map(str, (SEED, stream, *parts)))
    word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return (word >> 1) / 2**63


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    """Clips of 40 frames at 12 a second, 80 wide and 48 high; the last one 40 wide and 90 high."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(CLIPS):
        height, width = (90, 40) if number == UPRIGHT else (48, 80)
        file = folder / f"clip{number}.mp4"
        write_clip(file, count=FRAMES, fps=RATE, height=height, width=width)
        file.with_suffix(".txt").write_text(f"caption {number}")
    manifest = open_source(str(folder), work_dir=folder / ".work")
    buckets = np.zeros(CLIPS, int)
    tape = Tape(buckets, manifest.shard, [BUCKET], {BUCKET: 3}, seed=SEED, group=1)
    data = DataConfig(num_workers=1)
    with Loader(manifest, tape, BUCKETS, data, seed=SEED, micro_batches=4) as made:
        yield made


def test_window_and_crop_are_those_of_the_key(loader: Loader) -> None:
    """At 6 of 12 frames a second a window is 9 frames long, so it begins at frame 0 to 31; a crop of 48 x 48 has 32
    columns to move over, of which the middle half is used, and no rows."""
    for row in range(UPRIGHT):
        for epoch in range(3):
            request = loader.request(row, epoch)
            start = int(keyed("window", epoch, row) * 32) / RATE
            assert request.times == pytest.approx([start + i / 6 for i in range(5)])
            left = 32 * (0.25 + 0.5 * keyed("crop", epoch, row, "x"))
            assert request.crop == pytest.approx((0.0, left, 48.0, 48.0))
    top = 50 * (0.25 + 0.5 * keyed("crop", 2, UPRIGHT, "y"))
    assert loader.request(UPRIGHT, 2).crop == pytest.approx((top, 0.0, 40.0, 40.0))


def test_epochs_show_other_moments_and_parts_and_repeat_exactly(loader: Loader) -> None:
    for row in range(CLIPS):
        cuts = [(loader.request(row, e).times, loader.request(row, e).crop) for e in range(6)]
        assert len({crop for _, crop in cuts}) == 6
        assert len({times for times, _ in cuts}) > 1
        assert cuts == [
            (loader.request(row, e).times, loader.request(row, e).crop) for e in range(6)
        ]
    assert len({loader.request(row, 0).crop for row in range(CLIPS)}) == CLIPS


def test_a_step_is_its_entries_of_the_tape_dealt_out_in_turn(loader: Loader) -> None:
    """Entry k of a step goes to rank k modulo ranks."""
    for step in (0, 1, 5):
        for ranks in (1, 2, 3):
            for rank in range(ranks):
                dealt = rows_for_rank(loader.tape, step, 4, rank, ranks)
                wanted = [rank + slot * ranks for slot in range(-(-4 // ranks))]
                expected = [4 * step + k if k < 4 else None for k in wanted]
                assert [one and one.index for one in dealt] == expected


def test_an_epoch_holds_every_clip_once_and_the_next_one_in_another_order(loader: Loader) -> None:
    tape = loader.tape
    per_epoch = tape.per_epoch
    assert per_epoch == 3, "seven clips by threes"
    orders = []
    for epoch in range(4):
        entries = [tape[epoch * per_epoch + offset] for offset in range(per_epoch)]
        assert {one.epoch for one in entries} == {epoch}
        assert {e for one in entries for e in one.epochs} == {epoch}
        orders.append([row for one in entries for row in one.rows])
        assert sorted(orders[-1]) == list(range(CLIPS))
    assert len({tuple(order) for order in orders}) == 4


def test_delivered_clips_show_the_moments_of_their_own_epoch(loader: Loader) -> None:
    """Each frame says its own number, so a frame more or less would show."""
    seen = set()
    for step in range(3):
        for batch in loader.step(step):
            assert [clip.row for clip in batch.clips] == list(batch.micro_batch.rows)
            assert [clip.epoch for clip in batch.clips] == list(batch.micro_batch.epochs)
            for clip in batch.clips:
                assert clip.pixels is not None
                start = int(keyed("window", clip.epoch, clip.row) * 32)
                shown = [number_of(frame) for frame in clip.pixels]
                assert shown == [start + 2 * i for i in range(5)]
                assert (clip.fps, clip.caption) == (6.0, f"caption {clip.row}")
                seen.add(clip.epoch)
    assert seen >= {0, 1, 2}
