"""Seats for images in the rows of videos, so that a step trains both. Pure.

A row is `group` micro-batches side by side. Videos are cut into rows of `group - seats`; here the seats
get micro-batches of images that cost what the row's dearest micro-batch does, or less where images are
few or small, as long as the rows wait no longer than allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A level is reached where images can cost this share of its dearest micro-batch.
REACHED = 0.97


@dataclass(frozen=True)
class Cut:
    """`count` micro-batches of `size` clips of bucket number `bucket`, all of one cost level."""

    bucket: int
    size: int
    count: int
    level: int


@dataclass(frozen=True)
class Rows:
    """Rows of `group` micro-batches with `seats` for images, which may wait `wait` of their time on average."""

    group: int
    seats: int
    wait: float


@dataclass(frozen=True)
class _Level:
    """`slots` micro-batches of videos in `rows` rows (the last may be open), the dearest of cost `top`."""

    number: int
    top: float
    slots: int
    rows: int


def dearest(cuts: Sequence[Cut], costs: Sequence[float]) -> float:
    """Cost of the dearest micro-batch."""
    return max(cut.size * costs[cut.bucket] for cut in cuts)


def idle_work(cuts: Sequence[Cut], top: float, costs: Sequence[float]) -> float:
    """What the cuts cost less than if each of their micro-batches cost `top`."""
    return sum(cut.count * (top - cut.size * costs[cut.bucket]) for cut in cuts)


def seat_images(
    cuts: Sequence[Cut],
    counts: Sequence[int],
    sizes: Sequence[int],
    costs: Sequence[float],
    rows: Rows,
) -> list[Cut] | None:
    """Cuts of images (`counts` of each bucket) for the seats in the rows of the other cuts.

    Where a level's cost is reached by images alone, more of them fill whole rows of it, which the tape
    then deals over all of its rows. None where the images are too few for the seats, or the rows would wait.
    """
    levels = _levels(cuts, counts, costs, rows)
    if not levels:
        return None
    seated = _deal([rows.seats * level.rows for level in levels], levels, counts, sizes, costs)
    if seated is None:
        return None
    left = list(counts)
    for cut in seated:
        left[cut.bucket] -= cut.size * cut.count
    beside = _deal(_places_beside(levels, left, sizes, costs, rows), levels, left, sizes, costs)
    seated += beside or []
    slots = sum(cut.count * level.top for level in levels for cut in _of(level, [*cuts, *seated]))
    idle = sum(idle_work(_of(level, [*cuts, *seated]), level.top, costs) for level in levels)
    return None if idle > rows.wait * slots else seated


def _of(level: _Level, cuts: Sequence[Cut]) -> list[Cut]:
    return [cut for cut in cuts if cut.level == level.number]


def _levels(
    cuts: Sequence[Cut], counts: Sequence[int], costs: Sequence[float], rows: Rows
) -> list[_Level]:
    """The levels that hold a row, and whose cost no single image exceeds."""
    least = max(cost for cost, count in zip(costs, counts, strict=True) if count)
    width = rows.group - rows.seats
    levels = []
    for number in sorted({cut.level for cut in cuts}):
        own = [cut for cut in cuts if cut.level == number]
        slots, top = sum(cut.count for cut in own), dearest(own, costs)
        if slots >= width and least <= top:
            levels.append(_Level(number, top, slots, -(-slots // width)))
    return levels


def _places_beside(
    levels: Sequence[_Level],
    left: Sequence[int],
    sizes: Sequence[int],
    costs: Sequence[float],
    rows: Rows,
) -> list[int]:
    """Micro-batches of further images in each level: what closes its last row, and whole rows."""
    used = [bucket for bucket, count in enumerate(left) if count]
    places = [0] * len(levels)
    reached = [
        at
        for at, level in enumerate(levels)
        if all(_full(b, level, sizes, costs) * costs[b] >= REACHED * level.top for b in used)
    ]
    if not used or not reached:
        return places
    spare = sum(left[bucket] * costs[bucket] for bucket in used)
    missing = [(rows.group - rows.seats) * level.rows - level.slots for level in levels]
    for at in sorted(reached, key=lambda at: missing[at] * levels[at].top):
        if missing[at] * levels[at].top <= spare:
            places[at], spare = missing[at], spare - missing[at] * levels[at].top
    row = rows.group * max(levels[at].top for at in reached)
    of_videos = np.array([levels[at].slots * levels[at].top for at in reached])
    for at, more in zip(reached, shared_out(int(spare / row), of_videos), strict=True):
        places[at] += rows.group * int(more)
    return places


def _full(bucket: int, level: _Level, sizes: Sequence[int], costs: Sequence[float]) -> int:
    """Clips of a micro-batch that costs what the level's dearest does, or as many as it holds."""
    # 1e-9: a cost reached exactly must not lose a clip to rounding.
    return min(sizes[bucket], int(level.top / costs[bucket] + 1e-9))


def _deal(
    places: Sequence[int],
    levels: Sequence[_Level],
    counts: Sequence[int],
    sizes: Sequence[int],
    costs: Sequence[float],
) -> list[Cut] | None:
    """Cuts for so many places in each level; None where there is not an image for each place.

    A bucket gets places by the number of its full micro-batches, spread evenly over the levels, and its
    clips are spread over its places in proportion to what fits into them.
    """
    buckets = [bucket for bucket, count in enumerate(counts) if count]
    if not any(places):
        return []
    if not buckets:
        return None
    full = np.array([counts[bucket] / sizes[bucket] for bucket in buckets])
    table = np.zeros((len(buckets), len(levels)), np.int64)
    bucket_of = _interleaved(shared_out(sum(places), full))
    np.add.at(table, (bucket_of, _interleaved(places)), 1)
    dealt: list[Cut] = []
    for bucket, of_level in zip(buckets, table, strict=True):
        room = of_level * [_full(bucket, level, sizes, costs) for level in levels]
        clips = shared_out(min(counts[bucket], int(room.sum())), room)
        if (clips < of_level).any():
            return None
        for level, count, total in zip(levels, of_level, clips, strict=True):
            dealt += _evenly(bucket, int(total), int(count), level.number)
    return dealt


def _interleaved(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Number i `counts[i]` times, each spread evenly over the whole."""
    number = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return number[np.argsort(place, kind="stable")]


def shared_out(total: int, weights: np.ndarray) -> np.ndarray:
    """`total` split into whole parts in proportion to the weights (Hamilton's method of largest remainders)."""
    if not total:
        return np.zeros(len(weights), np.int64)
    exact = total * np.asarray(weights, float) / np.sum(weights)
    parts = np.floor(exact + 1e-9).astype(np.int64)
    rest = total - int(parts.sum())
    parts[np.argsort(parts - exact, kind="stable")[:rest]] += 1
    return parts


def _evenly(bucket: int, clips: int, count: int, level: int) -> list[Cut]:
    """`count` micro-batches of so many clips in all, whose sizes differ by one at most."""
    if not count:
        return []
    least, larger = divmod(clips, count)
    cuts = [Cut(bucket, least + 1, larger, level), Cut(bucket, least, count - larger, level)]
    return [cut for cut in cuts if cut.count]
