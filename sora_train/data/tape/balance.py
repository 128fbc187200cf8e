"""How an epoch's clips are cut into micro-batches so that ranks side by side have equal work. Pure.

Engines wait for each other at every micro-batch, so a row of `group` micro-batches lasts as long as
its dearest one. Rows are made of one cost level: micro-batches whose predicted costs lie within 2 %.
Three things keep the rows full:

1. Buckets whose clips cost the same (one length, several aspect ratios) are cut together, into a
   whole number of rows where they fill one; their micro-batches then differ by at most one clip.
2. One clip more or less is too much where a micro-batch holds few. The level of the larger and the
   level of the smaller ones then leave a row open each, and micro-batches of cheaper clips (shorter
   ones, images), cut to the same cost, close it.
3. What still does not fill a row is left for the end of the epoch, in order of cost.

Only the counts of the buckets matter, so every epoch is cut alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Micro-batches whose predicted costs lie within this share of each other count as equal.
EQUAL_COST = 0.02
# From this many clips on, one more or less is within EQUAL_COST.
FINE = 50
# Micro-batches that a bucket which fills the rows of others keeps for itself at least.
FEW = 25
# Clips that fill this share of a row are spread over it.
NEARLY_FULL = 0.75


@dataclass(frozen=True)
class Cut:
    """`count` micro-batches of `size` clips of bucket number `bucket`, all of one cost level."""

    bucket: int
    size: int
    count: int
    level: int


def cut_epoch(
    counts: Sequence[int], sizes: Sequence[int], costs: Sequence[float], group: int
) -> list[Cut]:
    """The micro-batches of an epoch.

    Bucket b has `counts[b]` clips of predicted cost `costs[b]` each and at most `sizes[b]` in a
    micro-batch. Every clip is in exactly one cut.
    """
    classes = _classes(counts, sizes, costs)
    left = [int(count) for count in counts]
    cuts: list[Cut] = []
    for number, members in enumerate(classes):
        for bucket, size, count in _cut_class(members, left, sizes, costs, group):
            level = _level_for(size * costs[bucket], cuts, costs, group)
            cuts.append(Cut(bucket, size, count, level))
        cuts += _fill(cuts, classes[number + 1 :], left, sizes, costs, group)
    return cuts


def _classes(
    counts: Sequence[int], sizes: Sequence[int], costs: Sequence[float]
) -> list[list[int]]:
    """Buckets to be cut together: those whose clips cost the same, and all that are cut finely.

    Dearest first, since the cheaper clips fill what the dearer ones leave open.
    """
    used = [bucket for bucket, count in enumerate(counts) if count > 0]
    coarse = [bucket for bucket in used if sizes[bucket] < FINE]
    fine = [bucket for bucket in used if sizes[bucket] >= FINE]
    kinds = equal_costs(np.array([costs[bucket] for bucket in coarse]))
    classes = [
        [bucket for bucket, kind in zip(coarse, kinds, strict=True) if kind == number]
        for number in range(kinds.max(initial=-1), -1, -1)
    ]
    return [*classes, fine] if fine else classes


def equal_costs(costs: np.ndarray) -> np.ndarray:
    """Numbers the costs, in ascending order, so that equal numbers lie within EQUAL_COST of the least."""
    classes = np.zeros(len(costs), np.int64)
    number, least = -1, -np.inf
    for index in np.argsort(costs, kind="stable"):
        if number < 0 or costs[index] > least * (1 + EQUAL_COST):
            number, least = number + 1, costs[index]
        classes[index] = number
    return classes


def _cut_class(
    members: list[int],
    counts: Sequence[int],
    sizes: Sequence[int],
    costs: Sequence[float],
    group: int,
) -> list[tuple[int, int, int]]:
    """(bucket, size, count) of the buckets of a class.

    Where they about fill a row they are cut into whole rows, as evenly as it goes. Fewer are not spread
    over a row that one of its ranks would need alone: full micro-batches and a short one a bucket.
    """
    shared = [bucket for bucket in members if counts[bucket] > sizes[bucket]]
    pieces = {bucket: -(-counts[bucket] // sizes[bucket]) for bucket in members}
    total = sum(counts[bucket] for bucket in shared)
    size = min((sizes[bucket] for bucket in shared), default=1)
    even = total >= NEARLY_FULL * group * size or total // group >= FINE
    if even:
        missing = -sum(pieces[bucket] for bucket in shared) % group
        for _ in range(missing):
            bucket = max(shared, key=lambda b: counts[b] * costs[b] / pieces[b])
            if pieces[bucket] == counts[bucket]:
                break
            pieces[bucket] += 1
    pieces_of_class = []
    for bucket in members:
        if even and bucket in shared:
            least, larger = divmod(counts[bucket], pieces[bucket])
            pieces_of_class += [
                (bucket, least + 1, larger),
                (bucket, least, pieces[bucket] - larger),
            ]
        else:
            full, short = divmod(counts[bucket], sizes[bucket])
            pieces_of_class += [(bucket, sizes[bucket], full), (bucket, short, int(short > 0))]
    return [piece for piece in pieces_of_class if piece[2] > 0]


def _fill(
    cuts: list[Cut],
    fillers: list[list[int]],
    left: list[int],
    sizes: Sequence[int],
    costs: Sequence[float],
    group: int,
) -> list[Cut]:
    """Micro-batches of cheaper clips that close the open rows; what they take is taken off `left`.

    Levels that need the fewest clips go first, and each is closed whole or not at all. What remains
    of a class of `fillers` (dearest first) is enough for a row of its own.
    """
    filled: list[Cut] = []
    for _, level, open_slots, dearest in sorted(_open_rows(cuts, costs, group)):
        taken: list[Cut] = []
        missing = open_slots
        for members in fillers:
            spare = sum(left[b] for b in members)
            spare -= group * min(FINE, max(sizes[b] for b in members))
            for bucket in sorted(members, key=lambda b: -left[b]):
                # 1e-9: a cost reached exactly must not lose a clip to rounding.
                size = min(sizes[bucket], int(dearest / costs[bucket] + 1e-9))
                if size and size * costs[bucket] * (1 + EQUAL_COST) >= dearest:
                    # A bucket with few clips left could not be cut evenly with the rest of its class.
                    usable = min(spare, left[bucket] - sizes[bucket] * min(sizes[bucket], FEW))
                    count = max(0, min(missing, usable // size))
                    missing, spare = missing - count, spare - size * count
                    taken += [Cut(bucket, size, count, level)] if count else []
        if missing:
            continue
        for cut in taken:
            left[cut.bucket] -= cut.size * cut.count
        filled += taken
    return filled


def _open_rows(
    cuts: list[Cut], costs: Sequence[float], group: int
) -> list[tuple[float, int, int, float]]:
    """(cost missing, level, micro-batches missing, dearest micro-batch) of levels that fill no whole rows."""
    rows = []
    for level in sorted({cut.level for cut in cuts}):
        of_level = [cut for cut in cuts if cut.level == level]
        missing = -sum(cut.count for cut in of_level) % group
        dearest = max(cut.size * costs[cut.bucket] for cut in of_level)
        if missing:
            rows.append((missing * dearest, level, missing, dearest))
    return rows


def _level_for(cost: float, cuts: list[Cut], costs: Sequence[float], group: int) -> int:
    """The level of a cost: one whose rows are not yet full and whose costs it equals, or a new one."""
    levels = sorted({cut.level for cut in cuts})
    for level in levels:
        of_level = [cut for cut in cuts if cut.level == level]
        known = [cut.size * costs[cut.bucket] for cut in of_level]
        is_open = sum(cut.count for cut in of_level) % group
        if is_open and max(*known, cost) <= min(*known, cost) * (1 + EQUAL_COST):
            return level
    return len(levels)
