"""Laws of cutting an epoch: every clip once, no micro-batch too large, rows of equal cost, little left over."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.data.sample import Bucket
from sora_train.data.tape.balance import MERGED_WAIT, cut_epoch
from sora_train.data.tape.tape import Tape, imbalance, row_costs


@st.composite
def epochs(draw: st.DrawFn) -> tuple[list[int], list[int], list[float], int, list[int], int]:
    number = draw(st.integers(1, 12))
    counts = draw(st.lists(st.integers(0, 5000), min_size=number, max_size=number).filter(sum))
    sizes = draw(st.lists(st.integers(1, 200), min_size=number, max_size=number))
    costs = draw(st.lists(st.floats(0.01, 100), min_size=number, max_size=number))
    images = draw(st.lists(st.integers(0, number - 1), max_size=3))
    group = draw(st.sampled_from([1, 2, 8, 24, 64]))
    return counts, sizes, costs, group, images, group * draw(st.integers(1, 8))


@given(epochs())
@settings(max_examples=80, deadline=None)
def test_every_clip_is_cut_once_and_no_micro_batch_is_too_large(epoch):
    counts, sizes = epoch[:2]
    found: Counter[int] = Counter()
    for cut in cut_epoch(*epoch):
        assert cut.count > 0 and 1 <= cut.size <= sizes[cut.bucket]
        found[cut.bucket] += cut.size * cut.count
    assert [found[bucket] for bucket in range(len(counts))] == counts


@given(epochs())
@settings(max_examples=80, deadline=None)
def test_levels_wait_less_than_two_percent(epoch):
    costs = epoch[2]
    levels = defaultdict(list)
    for cut in cut_epoch(*epoch):
        levels[cut.level].append((cut.count, cut.size * costs[cut.bucket]))
    busy = sum(count * cost for level in levels.values() for count, cost in level)
    whole = sum(sum(n for n, _ in level) * max(c for _, c in level) for level in levels.values())
    assert busy >= 0.98 * whole


@given(epochs())
@settings(max_examples=80, deadline=None)
def test_without_images_each_level_waits_no_longer_than_merging_may_cost(epoch):
    counts, sizes, costs, group = epoch[:4]
    levels = defaultdict(list)
    for cut in cut_epoch(counts, sizes, costs, group):
        levels[cut.level].append((cut.count, cut.size * costs[cut.bucket]))
    for level in levels.values():
        whole = sum(count for count, _ in level) * max(cost for _, cost in level)
        assert sum(count * cost for count, cost in level) >= (1 - MERGED_WAIT) * whole * (1 - 1e-9)


def test_images_close_the_rows_that_videos_leave_open():
    # 8 ranks; 803 = 100 rows and 3 clips of the dear kind, and images at a hundredth of the cost.
    cuts = cut_epoch([803, 50_000], [1, 100], [100.0, 1.0], 8, images=[1])
    rows = Counter()
    for cut in cuts:
        rows[cut.level] += cut.count
    assert all(count % 8 == 0 for count in rows.values()), cuts
    # 50,000 images are 500 micro-batches: 3 of 8 places in the rows of the videos, as is their share of the work.
    assert sum(cut.count for cut in cuts if cut.bucket == 1 and cut.size == 100) >= 3 * 803 / 5


@pytest.mark.parametrize(
    ("images", "group", "micro_batches"),
    [(64_000, 64, 64), (3_000, 64, 64), (100_000, 8, 8), (3_000, 8, 64), (3_000, 4, 64)],
)
def test_every_step_has_images_and_videos(images: int, group: int, micro_batches: int):
    # An image costs a fiftieth of a video: 100,000 are a seventh of the work, 3,000 half a percent.
    bucket_of_row = np.repeat([0, 1], [12_000, images])
    buckets = [Bucket(65, 256, 256), Bucket(1, 256, 256)]
    tape = Tape(
        bucket_of_row, np.arange(len(bucket_of_row)) // 100, buckets,
        dict(zip(buckets, [1, 50], strict=True)), seed=0, group=group, micro_batches=micro_batches,
        cost=lambda bucket: 50.0 if bucket.frames > 1 else 1.0,
    )  # fmt: skip
    steps = tape.per_epoch // micro_batches
    frames = np.array([tape[index].bucket.frames for index in range(steps * micro_batches)])
    both = [{1, 65} <= set(step) for step in frames.reshape(steps, micro_batches).tolist()]
    assert np.mean(both) >= 0.95
    waits = row_costs(tape, micro_batches, group, steps=steps)
    assert 1 - waits.sum() / (waits.max(axis=1).sum() * group) <= 0.02


@pytest.mark.parametrize("ranks", [8, 64])
def test_rows_of_images_and_videos_wait_less_than_two_percent(ranks: int):
    rng = np.random.default_rng(0)
    buckets = [Bucket(f, h, w) for f in (1, 17, 33, 65) for h, w in ((256, 256), (288, 224))]
    bucket_of_row = rng.choice(
        len(buckets), 400_000, p=[0.15, 0.15, 0.1, 0.1, 0.1, 0.1, 0.15, 0.15]
    )

    def cost(bucket: Bucket) -> float:
        tokens = (1 + (bucket.frames - 1) // 4) * bucket.height * bucket.width // 256
        return tokens + tokens**2 / 14_000

    cap = 8 * cost(buckets[6])
    sizes = {bucket: int(cap / cost(bucket)) for bucket in buckets}
    tape = Tape(
        bucket_of_row, np.arange(400_000) // 1000, buckets, sizes, seed=0, group=ranks, cost=cost
    )
    assert tape.per_epoch % ranks == 0, "no row is shared by two epochs"
    waits = imbalance(row_costs(tape, ranks, ranks, steps=2 * tape.per_epoch // ranks))
    assert waits.mean() <= 0.02
    assert np.quantile(waits, 0.95) <= 0.04
