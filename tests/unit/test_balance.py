"""Laws of cutting an epoch: every clip once, no micro-batch too large, rows of equal cost, little left over."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.data.sample import Bucket
from sora_train.data.tape.balance import EQUAL_COST, cut_epoch
from sora_train.data.tape.tape import Tape, imbalance, row_costs


@st.composite
def epochs(draw: st.DrawFn) -> tuple[list[int], list[int], list[float], int]:
    number = draw(st.integers(1, 12))
    counts = draw(st.lists(st.integers(0, 5000), min_size=number, max_size=number).filter(sum))
    sizes = draw(st.lists(st.integers(1, 200), min_size=number, max_size=number))
    costs = draw(st.lists(st.floats(0.01, 100), min_size=number, max_size=number))
    return counts, sizes, costs, draw(st.sampled_from([1, 2, 8, 24, 64]))


@given(epochs())
@settings(max_examples=200, deadline=None)
def test_every_clip_is_cut_once_and_no_micro_batch_is_too_large(epoch):
    counts, sizes, costs, group = epoch
    found: Counter[int] = Counter()
    for cut in cut_epoch(counts, sizes, costs, group):
        assert cut.count > 0 and 1 <= cut.size <= sizes[cut.bucket]
        found[cut.bucket] += cut.size * cut.count
    assert [found[bucket] for bucket in range(len(counts))] == counts


@given(epochs())
@settings(max_examples=200, deadline=None)
def test_a_level_costs_the_same_within_the_limit(epoch):
    counts, sizes, costs, group = epoch
    levels = defaultdict(list)
    for cut in cut_epoch(counts, sizes, costs, group):
        levels[cut.level].append(cut.size * costs[cut.bucket])
    for level in levels.values():
        assert max(level) <= min(level) * (1 + EQUAL_COST) * (1 + 1e-9)


def test_images_close_the_rows_that_videos_leave_open():
    # 8 ranks; 803 = 100 rows and 3 clips of the dear kind, and images at a hundredth of the cost.
    cuts = cut_epoch([803, 50_000], [1, 100], [100.0, 1.0], group=8)
    rows = Counter()
    for cut in cuts:
        rows[cut.level] += cut.count
    assert all(count % 8 == 0 for count in rows.values()), cuts
    assert any(cut.bucket == 1 and cut.size == 100 and cut.count == 5 for cut in cuts)


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
    assert waits.max() <= 0.02
    assert waits.mean() <= 0.01
