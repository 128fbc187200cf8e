"""Tapes in sequence: the mix of sources changes at a step, new shards join at the end of an epoch, clips are left out.

Each part is a tape of its own that begins where the part before it ends. Passes over a source are
counted across parts, so that no draw is made twice for the same sample.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sora_train.data.sample import Bucket, MicroBatch
from sora_train.data.tape.tape import SourceRepeats, Tape


@dataclass(frozen=True)
class Change:
    """From micro-batch `first` on the first `rows` rows are trained, but not the `excluded` ones, and each source
    `repeats` times an epoch."""

    first: int
    rows: int
    repeats: tuple[float, ...]
    excluded: tuple[int, ...] = ()


@dataclass(frozen=True)
class Exclusion:
    """From micro-batch `first` on these rows are in none, whatever was planned."""

    first: int
    rows: frozenset[int]


MakeTape = Callable[[Change, Sequence[SourceRepeats], int], Tape]
"""(change, repeats and earlier passes of each source, epochs before) -> the tape of that part."""


class TapeSequence:
    """The whole tape of a run. `parts` follow each other; all but the last end where the next begins.

    Each of the `exclusions` holds until the next one; what it leaves of a micro-batch is trained.
    """

    def __init__(
        self, changes: Sequence[Change], make: MakeTape, exclusions: Sequence[Exclusion] = ()
    ):
        self.parts: list[Tape] = []
        self.exclusions = list(exclusions)
        for change in changes:
            passes, epochs = [0] * len(change.repeats), 0
            if self.parts:
                before = self.parts[-1]
                assert change.first > before.first, "parts of a tape follow each other"
                done = -(-(change.first - before.first) // before.per_epoch)
                passes = [source.passes_begun(done) for source in before.passes]
                epochs = before.first_epoch + done
            source_repeats = [
                SourceRepeats(often, begun)
                for often, begun in zip(change.repeats, passes, strict=True)
            ]
            self.parts.append(make(change, source_repeats, epochs))
        self._firsts = [part.first for part in self.parts]
        # A row has the same bucket in every part that trains it, and none in the others.
        self.buckets = self.parts[-1].buckets
        self.bucket_of_row = np.max([part.bucket_of_row for part in self.parts], axis=0)
        self.rows = np.flatnonzero(self.bucket_of_row >= 0)

    def at(self, index: int) -> Tape:
        """The part that micro-batch `index` belongs to."""
        return self.parts[max(0, bisect_right(self._firsts, index) - 1)]

    def __getitem__(self, index: int) -> MicroBatch:
        entry, excluded = self.at(index)[index], self.excluded_at(index)
        kept = [n for n, row in enumerate(entry.rows) if row not in excluded]
        if len(kept) == len(entry.rows):
            return entry
        rows, epochs = (tuple(each[n] for n in kept) for each in (entry.rows, entry.epochs))
        return replace(entry, rows=rows, epochs=epochs)

    def excluded_at(self, index: int) -> frozenset[int]:
        """The rows that micro-batch `index` must not have."""
        begun = [one.rows for one in self.exclusions if one.first <= index]
        return begun[-1] if begun else frozenset()

    def bucket_of(self, row: int) -> Bucket:
        """The bucket of a trained row."""
        return self.buckets[self.bucket_of_row[row]]

    def clip_cost(self, bucket: Bucket) -> float:
        """Predicted cost of a clip of a bucket."""
        return self.parts[-1].clip_cost(bucket)

    def cost(self, micro_batch: MicroBatch) -> float:
        """Predicted cost of a micro-batch."""
        return self.parts[-1].cost(micro_batch)

    def costs(self, first: int, count: int) -> np.ndarray:
        """Predicted costs of `count` micro-batches from index `first` on."""
        costs = [np.zeros(0)]
        while count > 0:
            part, end = self.at(first), self.end_of(first)
            taken = count if end is None else min(count, end - first)
            if any(part.first < one.first < first + taken for one in self.exclusions):
                # Clips of an epoch that was planned with them may be missing.
                costs.append(np.array([self.cost(self[first + n]) for n in range(taken)]))
            else:
                costs.append(part.costs(first, taken))
            first, count = first + taken, count - taken
        return np.concatenate(costs)

    def end_of(self, index: int) -> int | None:
        """The first micro-batch after the part that `index` belongs to; None where it is the last."""
        number = max(0, bisect_right(self._firsts, index) - 1)
        return self._firsts[number + 1] if number + 1 < len(self._firsts) else None

    def epochs_before(self, index: int) -> float:
        """How many epochs the tape holds before micro-batch `index`."""
        part = self.at(index)
        return part.first_epoch + (index - part.first) / part.per_epoch

    def index_after(self, epochs: float) -> int:
        """The first micro-batch that is not needed for so many epochs."""
        for part in reversed(self.parts):
            if epochs >= part.first_epoch:
                return part.first + int(
                    np.ceil((epochs - part.first_epoch) * part.per_epoch - 1e-9)
                )
        return 0

    def end_of_epoch(self, index: int) -> int:
        """The first micro-batch of the epoch that begins at `index` or next after it."""
        part = self.at(index)
        begun = -(-(index - part.first) // part.per_epoch)
        end, cut = part.first + begun * part.per_epoch, self.end_of(index)
        return end if cut is None else min(end, cut)


def repeats_of(weights: Sequence[float], clips: Sequence[int]) -> tuple[float, ...]:
    """Passes over each source in an epoch, so that its clips are used in the ratio of `weights`.

    The epoch is the shortest one that uses every clip of each weighted source at least once.
    """
    lengths = [n / weight for n, weight in zip(clips, weights, strict=True) if weight > 0]
    length = max(lengths, default=0.0)
    return tuple(
        weight * length / n if n > 0 else 0.0 for n, weight in zip(clips, weights, strict=True)
    )
