"""How an epoch's clips are cut into micro-batches so that ranks side by side have equal work. Pure.

Engines wait for each other at every micro-batch, so a row of `group` micro-batches lasts as long as
its dearest one. Rows are made of one cost level, and on average wait less than 2 % of their time:

1. Buckets whose clips cost the same (one length, several aspect ratios) are cut together, into a
   whole number of rows where they fill one; their micro-batches then differ by at most one clip.
2. One clip more or less is too much where a micro-batch holds few. The level of the larger and the
   level of the smaller ones then leave a row open each, and micro-batches of cheaper clips (shorter
   ones), cut to the same cost, close it.
3. Levels of nearly one cost become one, so that their rows mix lengths.
4. Images have seats in the rows of videos (seats.py), so that a step trains both. Where a seat that
   few images fill is too large a share of a row, and a step has several rows, they get small
   micro-batches in rows of their own, one a step.
5. What still does not fill a row is left for the end of the epoch, in order of cost.

Only the counts of the buckets matter, so every epoch is cut alike.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from sora_train.data.tape.seats import Cut, Rows, dearest, idle_work, seat_images

# Micro-batches whose predicted costs lie within this share of each other count as equal.
EQUAL_COST = 0.01
# From this many clips on, one more or less is within EQUAL_COST.
FINE = 50
# Micro-batches that a bucket which fills the rows of others keeps for itself at least.
FEW = 25
# Clips that fill this share of a row are spread over it.
NEARLY_FULL = 0.75
# Share of their time that the ranks of a row may wait on average for its dearest micro-batch ...
WAIT = 0.019
# ... and where levels of different cost become one.
MERGED_WAIT = 0.015
# Rows of a step from which on images may have one of them for themselves.
ROWS_FOR_IMAGES = 3


def cut_epoch(
    counts: Sequence[int],
    sizes: Sequence[int],
    costs: Sequence[float],
    group: int,
    images: Collection[int] = (),
    micro_batches: int = 0,
) -> list[Cut]:
    """The micro-batches of an epoch.

    Bucket b has `counts[b]` clips of predicted cost `costs[b]` each and at most `sizes[b]` in a
    micro-batch. `images` are the buckets that belong into each step of `micro_batches` (0: `group`)
    beside the others. Every clip is in exactly one cut.
    """
    videos = [0 if bucket in images else int(count) for bucket, count in enumerate(counts)]
    left = [int(count) if bucket in images else 0 for bucket, count in enumerate(counts)]
    if not any(videos) or not any(left):
        return _merged(_cut_rows(counts, sizes, costs, group), costs)
    full = [_full_micro_batches(of, sizes) for of in (videos, left)]
    most = min(group - 1, max(1, int(group * full[1] / sum(full))))
    for seats in range(most, -1, -1):
        cuts = _cut_rows(videos, sizes, costs, group - seats)
        seated = seat_images(cuts, left, sizes, costs, Rows(group, seats, WAIT)) or []
        if seated:
            break
    rows_of_step = max(micro_batches, group) // group
    rows = sum(cut.count for cut in cuts) // group
    few = sum(cut.count for cut in seated) * rows_of_step < rows
    if few and rows_of_step >= ROWS_FOR_IMAGES:
        # Fewer than one a step: they get small micro-batches in rows of their own.
        seated = []
        sizes = _smaller(left, sizes, group * (rows // (rows_of_step - 1) + 1))
    for cut in seated:
        left[cut.bucket] -= cut.size * cut.count
    cuts = _merged([*cuts, *seated], costs)
    above = 1 + max(cut.level for cut in cuts)
    alone = _merged(_cut_rows(left, sizes, costs, group), costs)
    return [*cuts, *(replace(cut, level=cut.level + above) for cut in alone)]


def _full_micro_batches(counts: Sequence[int], sizes: Sequence[int]) -> float:
    return sum(count / size for count, size in zip(counts, sizes, strict=True) if count)


def _smaller(counts: Sequence[int], sizes: Sequence[int], number: int) -> list[int]:
    """Sizes in the same proportions, so that the clips make `number` micro-batches or more."""
    smaller = min(1.0, _full_micro_batches(counts, sizes) / number)
    return [max(1, int(size * smaller)) for size in sizes]


def _cut_rows(
    counts: Sequence[int], sizes: Sequence[int], costs: Sequence[float], group: int
) -> list[Cut]:
    """Clips cut class by class into rows of `group`; cheaper ones close what dearer ones leave open."""
    classes = _classes(counts, sizes, costs)
    left = [int(count) for count in counts]
    cuts: list[Cut] = []
    for number, members in enumerate(classes):
        for bucket, size, count in _cut_class(members, left, sizes, costs, group):
            level = _level_for(size * costs[bucket], cuts, costs, group)
            cuts.append(Cut(bucket, size, count, level))
        cuts += _fill(cuts, classes[number + 1 :], left, sizes, costs, group)
    return cuts


def _merged(cuts: list[Cut], costs: Sequence[float]) -> list[Cut]:
    """The same cuts with levels made one, from the dearest down, as long as their rows wait MERGED_WAIT at most."""
    of_level: dict[int, list[Cut]] = {}
    for cut in cuts:
        of_level.setdefault(cut.level, []).append(cut)
    merged: list[list[Cut]] = []
    for own in sorted(of_level.values(), key=lambda own: -dearest(own, costs)):
        together = [*merged[-1], *own] if merged else own
        slots = sum(cut.count for cut in together)
        top = dearest(together, costs)
        if merged and idle_work(together, top, costs) <= MERGED_WAIT * top * slots:
            merged[-1] = together
        else:
            merged.append(own)
    return [replace(cut, level=number) for number, own in enumerate(merged) for cut in own]


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
    for _, level, open_slots, highest in sorted(_open_rows(cuts, costs, group)):
        taken: list[Cut] = []
        missing = open_slots
        for members in fillers:
            spare = sum(left[b] for b in members)
            spare -= group * min(FINE, max(sizes[b] for b in members))
            for bucket in sorted(members, key=lambda b: -left[b]):
                # 1e-9: a cost reached exactly must not lose a clip to rounding.
                size = min(sizes[bucket], int(highest / costs[bucket] + 1e-9))
                if size and size * costs[bucket] * (1 + EQUAL_COST) >= highest:
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
