"""The tape: an endless, world-size-free sequence of micro-batches. Pure functions of numpy arrays.

The micro-batches of a step depend on the manifest, the buckets, the seed and the step alone. An epoch
makes passes over the sources (shuffle.py). Samples fill the micro-batch of their bucket in that order, and
micro-batches leave in groups of nearly equal cost, so that ranks that work side by side finish
together (balance.py cuts them). A sample's bucket does not depend on the epoch, so every epoch has
the same counts, and a step maps to (epoch, offset) by division.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sora_train.data.sample import Bucket, MicroBatch
from sora_train.data.tape.balance import EQUAL_COST, cut_epoch
from sora_train.data.tape.seats import Cut
from sora_train.data.tape.shuffle import ShuffledPasses, compact
from sora_train.errors import UserError

__all__ = ["EQUAL_COST", "Epoch", "SourceRepeats", "Tape", "TapeLike", "rows_for_rank"]

_EPOCHS_KEPT = 2


@dataclass(frozen=True)
class SourceRepeats:
    """Passes over a source in an epoch, and passes begun before."""

    repeats: float = 1.0
    first_pass: int = 0


@dataclass(frozen=True)
class Epoch:
    """One epoch of the tape: micro-batch i holds `rows[starts[i]:starts[i + 1]]` of `bucket[i]`.

    `passes` are the rows' own epochs.
    """

    rows: np.ndarray
    passes: np.ndarray
    starts: np.ndarray
    bucket: np.ndarray


class TapeLike(Protocol):
    """The interface of `Tape` and `TapeSequence` for their readers."""

    rows: np.ndarray
    bucket_of_row: np.ndarray
    buckets: list[Bucket]

    def __getitem__(self, index: int) -> MicroBatch: ...

    def costs(self, first: int, count: int) -> np.ndarray: ...

    def bucket_of(self, row: int) -> Bucket: ...


class Tape:
    """`tape[index]` is micro-batch `index` of the endless sequence; planning one epoch makes a seek free.

    `bucket_of_row` indexes `buckets` (-1: the row is not trained), `shards` names each row's shard
    (strings or numbers), `sizes` gives the most clips a micro-batch holds, `cost` the predicted
    cost of a clip of a bucket. Of several sources `source_of_row` indexes `mix`; they are spread
    evenly over an epoch. A tape that continues another begins with micro-batch `first` and
    epoch `first_epoch`. Raises UserError where no row has a bucket.
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
        micro_batches: int = 0,
        window_shards: int = 64,
        cost: Callable[[Bucket], float] | None = None,
        source_of_row: np.ndarray | None = None,
        mix: Sequence[SourceRepeats] = (SourceRepeats(),),
        first: int = 0,
        first_epoch: int = 0,
    ):
        self.bucket_of_row = np.asarray(bucket_of_row)
        self.buckets = list(buckets)
        self.rows = np.flatnonzero(self.bucket_of_row >= 0)
        if len(self.rows) == 0:
            raise UserError(
                "no clip fits any bucket, so there is nothing to train on; see the reasons listed"
            )
        self.seed, self.group, self.first, self.first_epoch = seed, group, first, first_epoch
        self.sizes = dict(sizes)
        source = (
            np.zeros(len(self.rows), int) if source_of_row is None else source_of_row[self.rows]
        )
        bucket, shard = self.bucket_of_row[self.rows], np.asarray(shards)[self.rows]
        self._of_source = [np.flatnonzero(source == number) for number in range(len(mix))]
        self.passes = [
            ShuffledPasses(
                bucket[own],
                shard[own],
                buckets=len(self.buckets),
                seed=seed,
                number=number,
                window_shards=window_shards,
                repeats=source_repeats.repeats,
                first_pass=source_repeats.first_pass,
            )
            for number, (source_repeats, own) in enumerate(zip(mix, self._of_source, strict=True))
        ]
        self._bucket = compact(bucket, len(self.buckets))
        self._cost = np.array(
            [float(cost(b) if cost else b.frames * b.height * b.width) for b in self.buckets]
        )
        count = np.sum([passes.per_epoch for passes in self.passes], axis=0)
        self.clips_per_epoch = int(count.sum())
        self._cut(count.tolist(), micro_batches)
        self._epochs: OrderedDict[int, Epoch] = OrderedDict()
        self._lock = threading.Lock()

    def _cut(self, clips: list[int], micro_batches: int) -> None:
        most = [self.sizes.get(bucket, 1) for bucket in self.buckets]
        frames = np.array([bucket.frames for bucket in self.buckets])
        images = np.flatnonzero(frames == 1).tolist()
        cuts = cut_epoch(clips, most, self._cost.tolist(), self.group, images, micro_batches)
        self._cuts = _MicroBatches.of(cuts, self._cost)
        self.per_epoch = len(self._cuts.size)
        self._frames = frames[self._cuts.bucket]
        pairs = np.stack([self._cuts.level, self._frames])
        self._kind = np.unique(pairs, axis=1, return_inverse=True)[1]

    def bucket_of(self, row: int) -> Bucket:
        """The bucket of a trained row."""
        return self.buckets[self.bucket_of_row[row]]

    def clip_cost(self, bucket: Bucket) -> float:
        """Predicted cost of a clip of a bucket."""
        return float(self._cost[self.buckets.index(bucket)])

    def cost(self, micro_batch: MicroBatch) -> float:
        """Predicted cost of a micro-batch."""
        return self.clip_cost(micro_batch.bucket) * len(micro_batch.rows)

    def __getitem__(self, index: int) -> MicroBatch:
        number, offset = divmod(index - self.first, self.per_epoch)
        epoch = self.epoch(number)
        part = slice(epoch.starts[offset], epoch.starts[offset + 1])
        return MicroBatch(
            index,
            self.buckets[epoch.bucket[offset]],
            self.first_epoch + number,
            tuple(epoch.rows[part].tolist()),
            tuple(epoch.passes[part].tolist()),
        )

    def epoch(self, number: int) -> Epoch:
        """The plan of an epoch (0: the first of this tape); the last two are kept."""
        with self._lock:
            if number not in self._epochs:
                self._epochs[number] = self._plan(number)
                while len(self._epochs) > _EPOCHS_KEPT:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(number)
            return self._epochs[number]

    def costs(self, first: int, count: int) -> np.ndarray:
        """Predicted costs of `count` micro-batches from index `first` on."""
        costs = []
        while count > 0:
            number, offset = divmod(first - self.first, self.per_epoch)
            epoch = self.epoch(number)
            part = slice(offset, min(self.per_epoch, offset + count))
            sizes = epoch.starts[part.start + 1 : part.stop + 1] - epoch.starts[part]
            costs.append(self._cost[epoch.bucket[part]] * sizes)
            first, count = first + len(sizes), count - len(sizes)
        return np.concatenate(costs) if costs else np.zeros(0)

    def _plan(self, number: int) -> Epoch:
        cuts = self._cuts
        samples, passes = self._mixed_passes(number)
        # Stable: each bucket's samples stay in the order of the passes.
        by_bucket = np.argsort(self._bucket[samples], kind="stable")
        order = self._order(done=by_bucket[cuts.begin + cuts.size - 1], number=number)
        begin, size = cuts.begin[order], cuts.size[order]
        starts = np.concatenate([[0], np.cumsum(size)])
        source = np.repeat(begin - starts[:-1], size)
        source += np.arange(starts[-1])
        taken = by_bucket[source]
        return Epoch(self.rows[samples[taken]], passes[taken], starts, cuts.bucket[order])

    def _mixed_passes(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The trained rows of an epoch and their passes, the sources evenly mixed."""
        of_source = [passes.epoch(number) for passes in self.passes]
        if len(of_source) == 1:
            return of_source[0]
        rows = np.concatenate(
            [own[samples] for own, (samples, _) in zip(self._of_source, of_source, strict=True)]
        )
        passes = np.concatenate([passes for _, passes in of_source])
        counts = [len(samples) for samples, _ in of_source]
        place = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
        order = np.argsort(place, kind="stable")
        return rows[order], passes[order]

    def _order(self, done: np.ndarray, number: int) -> np.ndarray:
        """The order in which micro-batches leave: groups of equal cost as they fill, the rest by cost.

        `done` is the place in the passes where each micro-batch got its last sample. The lengths of a
        level are spread evenly over its groups; in a group the dearest come first, so that fewer ranks
        than a group has micro-batches work on equal ones. Groups begin at multiples of `group` on the
        endless tape. Where the epoch before left a group open, the dearest of this epoch's rest close
        it, since the dearest opened it.
        """
        cuts = self._cuts
        queue = np.lexsort((done, evenly(self._kind, done), cuts.level))
        levels = cuts.level[queue]
        first = np.searchsorted(levels, levels, side="left")
        total = np.searchsorted(levels, levels, side="right") - first
        in_group = np.arange(len(queue)) - first < total // self.group * self.group
        groups = queue[in_group].reshape(-1, self.group)
        if len(groups):
            of_images = (self._frames[groups] == 1).all(axis=1).astype(int)
            groups = groups[np.argsort(evenly(of_images, done[groups].max(axis=1)), kind="stable")]
            dearest_first = np.argsort(-cuts.cost[groups], axis=1, kind="stable")
            groups = np.take_along_axis(groups, dearest_first, axis=1)
        rest = queue[~in_group]
        open_slots = -(self.first + number * self.per_epoch) % self.group
        if open_slots > len(rest) and len(groups):
            rest, groups = np.concatenate([rest, groups[-1]]), groups[:-1]
        rest = rest[np.lexsort((done[rest], cuts.cost[rest]))]
        middle = max(0, len(rest) - open_slots)
        return np.concatenate([rest[middle:], groups.reshape(-1), rest[:middle]])


@dataclass(frozen=True)
class _MicroBatches:
    """The micro-batches of every epoch, bucket by bucket; `begin` counts samples across buckets."""

    bucket: np.ndarray
    begin: np.ndarray
    size: np.ndarray
    level: np.ndarray
    cost: np.ndarray

    @classmethod
    def of(cls, cuts: Sequence[Cut], costs: np.ndarray) -> _MicroBatches:
        number = np.repeat(np.arange(len(cuts)), [cut.count for cut in cuts])
        # Different sizes of a bucket alternate evenly over the epoch.
        place = np.concatenate([(np.arange(cut.count) + 0.5) / cut.count for cut in cuts])
        bucket = np.array([cut.bucket for cut in cuts])[number]
        order = np.lexsort((place, bucket))
        number, bucket = number[order], bucket[order]
        size = np.array([cut.size for cut in cuts])[number]
        level = np.array([cut.level for cut in cuts])[number]
        return cls(bucket, np.cumsum(size) - size, size, level, costs[bucket] * size)


def evenly(kind: np.ndarray, order: np.ndarray) -> np.ndarray:
    """A place in (0, 1) for each member; those of one kind are evenly apart, in the given order."""
    queue = np.lexsort((order, kind))
    kinds = kind[queue]
    first = np.searchsorted(kinds, kinds, side="left")
    count = np.searchsorted(kinds, kinds, side="right") - first
    place = np.empty(len(queue))
    place[queue] = (np.arange(len(queue)) - first + 0.5) / count
    return place


def rows_for_rank(
    tape: TapeLike, step: int, micro_batches: int, rank: int, world_size: int
) -> list[MicroBatch | None]:
    """The micro-batches of a step that a rank works on, one for each of its slots.

    A step is `micro_batches` entries of the tape; rank r takes entries r, r + world_size, ...
    Every rank has the same number of slots; None is one for which no entry is left.
    """
    first = step * micro_batches
    slots = -(-micro_batches // world_size)
    entries = [rank + slot * world_size for slot in range(slots)]
    return [tape[first + entry] if entry < micro_batches else None for entry in entries]


def row_costs(
    tape: TapeLike, micro_batches: int, world_size: int, *, first_step: int = 0, steps: int = 1
) -> np.ndarray:
    """Predicted cost of each rank's micro-batch, (rows, world_size): ranks wait for each other once a row.

    Slots left over, where the ranks do not divide the step, are 0.
    """
    slots = -(-micro_batches // world_size)
    costs = np.zeros((steps, slots * world_size))
    costs[:, :micro_batches] = tape.costs(
        first_step * micro_batches, steps * micro_batches
    ).reshape(steps, micro_batches)
    return costs.reshape(steps * slots, world_size)


def imbalance(costs: np.ndarray) -> np.ndarray:
    """(max - mean) / max of every row of `row_costs`: the share of the row that an average rank waits."""
    most = costs.max(axis=1)
    return (most - costs.mean(axis=1)) / most


def slot_efficiency(micro_batches: int, world_size: int) -> float:
    """Share of a step's slots that hold a micro-batch; 1 where the ranks divide the step."""
    return micro_batches / (world_size * -(-micro_batches // world_size))


def require_efficiency(micro_batches: int, world_size: int, least: float) -> None:
    """Raises UserError, naming the world sizes nearby, where too many slots would idle."""
    efficiency = slot_efficiency(micro_batches, world_size)
    if efficiency < least - 1e-9:
        raise UserError(
            f"train.micro_batches={micro_batches} keep {efficiency:.0%} of {world_size} ranks busy, less than "
            f"elastic.min_efficiency={least:g}; nearby: {nearby_efficiencies(micro_batches, world_size)}; start on "
            "one of those, choose train.micro_batches as a multiple of the ranks (it changes the run), or lower "
            "elastic.min_efficiency"
        )


def nearby_efficiencies(micro_batches: int, world_size: int) -> str:
    """The slot efficiency of the next world sizes and of the nearest full ones, as text."""
    full = [size for size in range(1, micro_batches + 1) if micro_batches % size == 0]
    below = max((size for size in full if size < world_size), default=None)
    above = min((size for size in full if size > world_size), default=None)
    sizes = {world_size - 1, world_size + 1, below, above} - {None, 0, world_size}
    return ", ".join(
        f"{size} ranks {slot_efficiency(micro_batches, size):.0%}"
        for size in sorted(size for size in sizes if size)
    )
