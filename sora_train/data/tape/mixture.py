"""Tapes in sequence: the mix of sources changes at a step, or new shards join at the end of an epoch.

Each part is a tape of its own that begins where the part before it ends. Passes over a source are
counted across parts, so that no draw is made twice for the same sample.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sora_train.data.sample import Bucket, MicroBatch
from sora_train.data.tape.tape import SourceRepeats, Tape


@dataclass(frozen=True)
class Change:
    """From micro-batch `first` on the first `rows` rows are trained, each source `repeats` times an epoch."""

    first: int
    rows: int
    repeats: tuple[float, ...]


MakeTape = Callable[[Change, Sequence[SourceRepeats], int], Tape]
"""(change, repeats and earlier passes of each source, epochs before) -> the tape of that part."""


class TapeSequence:
    """The whole tape of a run. `parts` follow each other; all but the last end where the next begins."""

    def __init__(self, changes: Sequence[Change], make: MakeTape):
        self.parts: list[Tape] = []
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
        # The last part trains all rows of those before it.
        last = self.parts[-1]
        self.rows, self.bucket_of_row, self.buckets = last.rows, last.bucket_of_row, last.buckets

    def at(self, index: int) -> Tape:
        """The part that micro-batch `index` belongs to."""
        return self.parts[max(0, bisect_right(self._firsts, index) - 1)]

    def __getitem__(self, index: int) -> MicroBatch:
        return self.at(index)[index]

    def bucket_of(self, row: int) -> Bucket:
        """The bucket of a trained row."""
        return self.parts[-1].bucket_of(row)

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
