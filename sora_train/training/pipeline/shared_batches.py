"""Ranks that share the tokens of a micro-batch agree on its clips before they train on it.

Each rank reads the clips by itself. One may fail where the others do not (its node is slow, its disk is full), or
find in the cache what another has just stored. Without an agreement the ranks would hold tensors of different
shapes, or one of them would wait for ever.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from sora_train.data.sample import ClipBatch, Failure
from sora_train.errors import Fault
from sora_train.runtime.control_plane import ControlPlane
from sora_train.training.pipeline.encoding import CacheFiller

T = TypeVar("T")


def read_together(
    read: Callable[[], list[ClipBatch]],
    record: Callable[[Failure], None],
    filler: CacheFiller | None,
    control: ControlPlane,
) -> list[ClipBatch]:
    """The same batches on all ranks: those of `read()` without the clips that any rank failed on, and with the
    latents and embeddings that the cache stores, each encoded by one rank for all.

    `record` is called with each failure that only other ranks had.

    Raises:
        Exception: the error of `read` on this rank.
        Fault: another rank failed.
    """
    batches: list[ClipBatch] = []

    def read_here() -> list[tuple[list[Failure], set[int]]]:
        batches.extend(read())
        return [(batch.failures, lacking(batch, filler)) for batch in batches]

    of_ranks = together(read_here, control)
    shared: list[ClipBatch] = []
    lost: dict[int, Failure] = {}
    for number, batch in enumerate(batches):
        failed = {failure.row: failure for of_rank in of_ranks for failure in of_rank[number][0]}
        lost |= {row: failed[row] for row in failed.keys() - {f.row for f in batch.failures}}
        shared.append(without(batch, failed) if failed else batch)
    lacked = [
        set.union(*(of_rank[number][1] for of_rank in of_ranks)) for number in range(len(shared))
    ]

    def complete() -> dict[tuple[int, int], Any]:
        for row in sorted(lost):
            record(lost[row])
        return encoded(shared, lacked, filler, control) if filler else {}

    if not any(lacked):
        complete()
        return shared
    fields = {
        place: made for of_rank in together(complete, control) for place, made in of_rank.items()
    }
    return [
        replace(
            batch,
            clips=[
                replace(clip, **fields.get((number, i), {})) for i, clip in enumerate(batch.clips)
            ],
        )
        for number, batch in enumerate(shared)
    ]


def together(work: Callable[[], T], control: ControlPlane) -> list[T]:
    """The results of `work()` on all ranks; it fails on all of them or on none."""
    mine: list[T] = []
    error: Exception | None = None
    try:
        mine.append(work())
    except Exception as failure:
        error = failure
    of_ranks = control.gather_from_peers(mine)
    if error is not None:
        raise error
    if not all(of_ranks):
        first = control.world.dp_rank * control.world.cp
        failed = [first + number for number, value in enumerate(of_ranks) if not value]
        raise Fault(
            f"rank {failed[0]}, which shares its clips with this one, failed; its own log says why"
        )
    return [value[0] for value in of_ranks]


def lacking(batch: ClipBatch, filler: CacheFiller | None) -> set[int]:
    """Rows that are to be encoded."""
    return {clip.row for clip in batch.clips if filler is not None and filler.lacks(clip)}


def without(batch: ClipBatch, failed: dict[int, Failure]) -> ClipBatch:
    """A micro-batch of which these rows are failures, in the order of its rows."""
    clips = [clip for clip in batch.clips if clip.row not in failed]
    failures = [failed[row] for row in batch.micro_batch.rows if row in failed]
    return replace(batch, clips=clips, failures=failures, weight=float(len(clips)))


def encoded(
    batches: Sequence[ClipBatch],
    lacked: Sequence[set[int]],
    filler: CacheFiller,
    control: ControlPlane,
) -> dict[tuple[int, int], dict[str, Any]]:
    """This rank's part of the lacking clips: the fields to replace, by number of the batch and of the clip."""
    places = [
        (number, i, clip)
        for number, batch in enumerate(batches)
        for i, clip in enumerate(batch.clips)
        if clip.row in lacked[number]
    ]
    made = {}
    for number, i, clip in places[control.world.cp_rank :: control.world.cp]:
        full = filler.with_text(filler.with_latents(clip))
        made[number, i] = {
            "pixels": None,
            "latents": full.latents,
            "logvar": full.logvar,
            "text": full.text,
        }
    return made
