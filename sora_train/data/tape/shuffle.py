"""The endless order of one source's samples: pass after pass, each in an order of its own. Pure.

A pass goes through the source in windows of shards: shards are shuffled, and samples inside each window.
An epoch of the tape takes the next samples of each bucket: all of them for a source with one pass an
epoch, a part of them or several passes otherwise. So after any number of epochs the samples of a bucket
were used equally often, give or take one.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from sora_train.base.seeding import key_seed
from sora_train.data.tape import keyed


def samples_per_epoch(count: np.ndarray, repeats: float) -> np.ndarray:
    """Samples of each bucket that an epoch takes of a source with `count` samples and `repeats` passes an epoch.

    A bucket with samples gives at least one, unless `repeats` is 0.
    """
    taken = np.rint(count * repeats).astype(np.int64)
    return np.maximum(taken, 1) * (count > 0) if repeats > 0 else taken


class ShuffledPasses:
    """The passes over the samples of one source, epoch by epoch of the tape.

    `bucket` and `shard` belong to the source's samples, `repeats` is the number of passes an epoch,
    `first_pass` that of passes begun before epoch 0, `number` that of the source.
    """

    def __init__(
        self,
        bucket: np.ndarray,
        shard: np.ndarray,
        *,
        buckets: int,
        seed: int,
        number: int = 0,
        window_shards: int = 64,
        repeats: float = 1.0,
        first_pass: int = 0,
    ):
        # Small integers sort in linear time and take little of the memory of a large manifest.
        self._bucket = compact(bucket, buckets)
        # Numbered by first appearance; sorting a million names would take seconds.
        shards = pa.array(shard).dictionary_encode()
        self._num_shards = len(shards.dictionary)
        self._shard = compact(shards.indices.to_numpy(), self._num_shards)
        self._seed, self._number = seed, number
        self._window_shards, self._first_pass = window_shards, first_pass
        self.count = np.bincount(self._bucket, minlength=buckets)
        self.per_epoch = samples_per_epoch(self.count, repeats)

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples of an epoch in order, and the pass that each belongs to."""
        begin, end = number * self.per_epoch, (number + 1) * self.per_epoch
        used = self.per_epoch > 0
        first = begin[used] // self.count[used]
        last = (end[used] - 1) // self.count[used]
        turns = {
            turn for low, high in zip(first, last, strict=True) for turn in range(low, high + 1)
        }
        samples = [np.zeros(0, np.int64)]
        passes = [np.zeros(0, np.int32)]
        for turn in sorted(turns):
            done = turn * self.count
            samples.append(self._part(turn, begin - done, end - done))
            passes.append(np.full(len(samples[-1]), self._first_pass + turn, np.int32))
        return np.concatenate(samples), np.concatenate(passes)

    def passes_begun(self, epochs: int) -> int:
        """The number of passes begun in so many epochs and before epoch 0."""
        used = self.per_epoch > 0
        turns = -(-epochs * self.per_epoch[used] // self.count[used])
        return self._first_pass + int(turns.max(initial=0))

    def _part(self, turn: int, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Of every bucket the begin-th sample of a pass up to its end-th."""
        used = (begin < self.count) & (end > 0)
        if used[self.count > 0].all():
            order = self._order(turn, np.arange(len(self._bucket)))
        else:
            order = self._order(turn, np.flatnonzero(used[self._bucket]))
        if ((begin <= 0) & (end >= self.count))[used].all():
            return order
        bucket = self._bucket[order]
        by_bucket = np.argsort(bucket, kind="stable")
        rank = np.empty(len(order), np.int64)
        starts = np.cumsum(np.bincount(bucket, minlength=len(self.count)))
        rank[by_bucket] = np.arange(len(order)) - np.concatenate([[0], starts])[bucket[by_bucket]]
        return order[(rank >= begin[bucket]) & (rank < end[bucket])]

    def _order(self, turn: int, samples: np.ndarray) -> np.ndarray:
        """The samples in the order of a pass: window by window of shuffled shards, shuffled inside each.

        A sample's place depends on (seed, source, pass, sample) alone, not on the other samples.
        """
        what = (turn + self._first_pass, self._number)
        rng = np.random.Generator(np.random.Philox(key_seed(self._seed, "tape_shards", *what)))
        window = rng.permutation(self._num_shards) // self._window_shards
        # One word holds window, chance and sample: sorting words is several times faster than an argsort.
        bits_below = np.uint64(max(1, len(self._bucket).bit_length()))
        bits_above = np.uint64(64 - max(1, int(window.max(initial=0)).bit_length()))
        draw = keyed.words(key_seed(self._seed, "tape_samples", *what), samples)
        draw >>= np.uint64(64) - (bits_above - bits_below)
        draw <<= bits_below
        draw |= samples.astype(np.uint64)
        draw |= window.astype(np.uint64)[self._shard[samples]] << bits_above
        draw.sort()
        draw &= (np.uint64(1) << bits_below) - np.uint64(1)
        return draw.astype(np.int64)


def compact(numbers: np.ndarray, count: int) -> np.ndarray:
    """The numbers, all below `count`, in the smallest unsigned type."""
    return numbers.astype(np.min_scalar_type(max(count - 1, 0)))
