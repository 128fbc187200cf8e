"""The tape: an endless, world-size-free sequence of micro-batches. Pure functions of numpy arrays.

What a step consumes depends on the manifest, the buckets, the seed and the step alone. An epoch
walks the manifest in windows of shards: shards are shuffled, samples are shuffled inside a window
and fill the micro-batch of their bucket; full micro-batches leave in groups of nearly equal cost,
so that ranks that work side by side finish together. Since a sample's bucket does not depend on the
epoch, every epoch has the same counts, and a step maps to (epoch, offset) by division.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from sora_train.data.sample import Bucket, MicroBatch
from sora_train.errors import ConfigError, UserError
from sora_train.keys import key_seed

# Micro-batches whose predicted costs lie within this share of each other count as equal.
EQUAL_COST = 0.02
_EPOCHS_KEPT = 2


def micro_batch_sizes(
    buckets: Sequence[Bucket],
    counts: Sequence[int],
    tokens_of: Callable[[Bucket], int],
    cost: Callable[[int], float],
    micro_batch: int | Literal["auto"],
    micro_batch_tokens: int,
) -> dict[Bucket, int]:
    """Clips in one micro-batch of each bucket that has any (`counts`: clips of each bucket).

    With `auto` the cap is the cost of as many clips of the largest bucket as `micro_batch_tokens`
    hold, at least one; other buckets take as many clips as cost no more. A bucket with fewer clips
    than that takes all it has.
    """
    used = {bucket: count for bucket, count in zip(buckets, counts, strict=True) if count > 0}
    if not used:
        return {}
    if micro_batch == "auto":
        largest = max(tokens_of(bucket) for bucket in used)
        cap = max(1, micro_batch_tokens // largest) * cost(largest)
        # 1e-9: the largest bucket itself must not lose a clip to rounding.
        wanted = {bucket: max(1, int(cap / cost(tokens_of(bucket)) + 1e-9)) for bucket in used}
    else:
        if micro_batch < 1:
            raise ConfigError(f"data.micro_batch={micro_batch} must be 1 or more, or auto")
        wanted = dict.fromkeys(used, micro_batch)
    return {bucket: min(wanted[bucket], int(count)) for bucket, count in used.items()}


@dataclass(frozen=True)
class Epoch:
    """One epoch of the tape: micro-batch i holds `rows[starts[i]:starts[i + 1]]` of `bucket[i]`."""

    rows: np.ndarray
    starts: np.ndarray
    bucket: np.ndarray


class Tape:
    """`tape[index]` is micro-batch `index` of the endless sequence; planning one epoch makes a seek free.

    `bucket_of_row` indexes `buckets` (-1: the row is not trained), `shards` names each row's shard
    (strings or numbers), `sizes` gives the clips of a full micro-batch, `cost` the predicted cost
    of a clip of a bucket. Raises UserError where no row has a bucket.
    """

    def __init__(
        self,
        bucket_of_row: np.ndarray,
        shards: np.ndarray,
        buckets: Sequence[Bucket],
        sizes: Mapping[Bucket, int],
        *,
        seed: int,
        group: int = 8,
        window_shards: int = 64,
        cost: Callable[[Bucket], float] | None = None,
    ):
        self.bucket_of_row = np.asarray(bucket_of_row)
        self.buckets = list(buckets)
        self.rows = np.flatnonzero(self.bucket_of_row >= 0)
        if len(self.rows) == 0:
            raise UserError(
                "no clip fits any bucket, so there is nothing to train on; see the reasons listed"
            )
        self.seed, self.group, self.window_shards = seed, group, window_shards
        self._bucket = self.bucket_of_row[self.rows]
        # Numbered by first appearance; sorting a million names would take seconds.
        self._shard = pa.array(np.asarray(shards)[self.rows]).dictionary_encode().indices.to_numpy()
        self._size = np.array([sizes.get(bucket, 1) for bucket in self.buckets])
        self._cost = np.array(
            [cost(b) if cost else b.frames * b.height * b.width for b in self.buckets]
        )
        per_bucket = np.bincount(self._bucket, minlength=len(self.buckets))
        self.per_epoch = int((-(-per_bucket // self._size)).sum())
        self._class_of_bucket = _cost_classes(self._cost * self._size)
        self._epochs: OrderedDict[int, Epoch] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def clips_per_epoch(self) -> int:
        return len(self.rows)

    def bucket_of(self, row: int) -> Bucket:
        """The bucket of a trained row."""
        return self.buckets[self.bucket_of_row[row]]

    def cost(self, micro_batch: MicroBatch) -> float:
        """Predicted cost of a micro-batch."""
        return float(self._cost[self.buckets.index(micro_batch.bucket)] * len(micro_batch.rows))

    def __getitem__(self, index: int) -> MicroBatch:
        number, offset = divmod(index, self.per_epoch)
        epoch = self.epoch(number)
        rows = epoch.rows[epoch.starts[offset] : epoch.starts[offset + 1]]
        return MicroBatch(index, self.buckets[epoch.bucket[offset]], number, tuple(rows.tolist()))

    def epoch(self, number: int) -> Epoch:
        """The plan of an epoch; the last two asked for are kept."""
        with self._lock:
            if number not in self._epochs:
                self._epochs[number] = self._plan(number)
                while len(self._epochs) > _EPOCHS_KEPT:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(number)
            return self._epochs[number]

    def _plan(self, number: int) -> Epoch:
        walk = self._walk(number)
        bucket = self._bucket[walk]
        # Stable: each bucket's samples stay in the order of the walk.
        by_bucket = np.argsort(bucket, kind="stable")
        count = np.bincount(bucket, minlength=len(self.buckets))
        first = np.concatenate([[0], np.cumsum(count)])
        batches = -(-count // self._size)
        batch_bucket = np.repeat(np.arange(len(self.buckets)), batches)
        nth = np.arange(len(batch_bucket)) - np.repeat(np.cumsum(batches) - batches, batches)
        begin = first[batch_bucket] + nth * self._size[batch_bucket]
        end = np.minimum(begin + self._size[batch_bucket], first[batch_bucket + 1])
        order = self._order(batch_bucket, end - begin, done=by_bucket[end - 1], number=number)

        begin, end = begin[order], end[order]
        starts = np.concatenate([[0], np.cumsum(end - begin)])
        source = np.arange(starts[-1]) + np.repeat(begin - starts[:-1], end - begin)
        rows = self.rows[walk[by_bucket[source]]]
        return Epoch(rows, starts, batch_bucket[order])

    def _walk(self, number: int) -> np.ndarray:
        """Positions of the trained rows, window of shuffled shards by window, shuffled inside each."""
        rng = np.random.Generator(np.random.Philox(key_seed(self.seed, "tape", number)))
        shard_rank = rng.permutation(int(self._shard.max()) + 1)
        window = shard_rank[self._shard] // self.window_shards
        shuffled = rng.permutation(len(self.rows))
        return shuffled[np.argsort(window[shuffled], kind="stable")]

    def _order(
        self, bucket: np.ndarray, size: np.ndarray, done: np.ndarray, number: int
    ) -> np.ndarray:
        """The order in which micro-batches leave: groups of equal cost as they fill, the rest by cost.

        `done` is where in the walk each micro-batch got its last sample. Groups begin at multiples
        of `group` on the endless tape: where an epoch before left one open, the rest of this epoch
        closes it.
        """
        cost_class = np.where(size == self._size[bucket], self._class_of_bucket[bucket], -1)
        queue = np.lexsort((done, cost_class))
        classes = cost_class[queue]
        place = np.arange(len(queue)) - np.searchsorted(classes, classes, side="left")
        total = np.searchsorted(classes, classes, side="right") - np.searchsorted(
            classes, classes, side="left"
        )
        in_group = (classes >= 0) & (place < total // self.group * self.group)
        groups = queue[in_group].reshape(-1, self.group)
        groups = groups[np.argsort(done[groups[:, -1]])] if len(groups) else groups
        rest = queue[~in_group]
        open_slots = -number * self.per_epoch % self.group
        missing = open_slots - len(rest)
        if missing > 0 and len(groups):
            rest, groups = np.concatenate([rest, groups[-1]]), groups[:-1]
        rest = rest[np.lexsort((done[rest], self._cost[bucket[rest]] * size[rest]))]
        return np.concatenate([rest[:open_slots], groups.reshape(-1), rest[open_slots:]])


def _cost_classes(costs: np.ndarray) -> np.ndarray:
    """Numbers the costs so that equal numbers lie within EQUAL_COST of the least of them."""
    classes = np.zeros(len(costs), np.int64)
    number, least = -1, -np.inf
    for index in np.argsort(costs, kind="stable"):
        if number < 0 or costs[index] > least * (1 + EQUAL_COST):
            number, least = number + 1, costs[index]
        classes[index] = number
    return classes


def rows_for_rank(
    tape: Tape, step: int, micro_batches: int, rank: int, world_size: int
) -> list[MicroBatch | None]:
    """The micro-batches of a step that a rank works on, one for each of its slots.

    A step is `micro_batches` entries of the tape; rank r takes entries r, r + world_size, ...
    Every rank has the same number of slots; None is one for which no entry is left.
    """
    first = step * micro_batches
    slots = -(-micro_batches // world_size)
    entries = [rank + slot * world_size for slot in range(slots)]
    return [tape[first + entry] if entry < micro_batches else None for entry in entries]
