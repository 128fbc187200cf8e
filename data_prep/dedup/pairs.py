"""The pairs of clips that are copies of each other: by their bytes, by what they show, or by a model's embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.dedup.alignment import distances
from data_prep.dedup.candidates import pairs_of_vectors, pairs_of_volumes
from data_prep.dedup.volume import SIDE, TIMES

EXACT, SAME_SOURCE = "exact", "same_source"
PERCEPTUAL, MIRRORED, EMBEDDING = "perceptual", "mirrored", "embedding"
# A copy is up to 5 % faster or slower, and its cuts are found some frames away at either end.
_SPEED, _FRAMES_AWAY = 1.06, 7


@dataclass(frozen=True)
class Clip:
    """What is compared of a clip. `run` is empty for those of this run."""

    key: str
    kind: str
    digest: str
    source_digest: str
    begin: float
    end: float
    frames: int
    duration: float
    volume: np.ndarray | None
    """uint8 (TIMES, SIDE, SIDE), or None where there is nothing in it to compare."""
    embedding: np.ndarray | None = None
    """float32 (d,) of length 1."""
    run: str = ""
    best: tuple[Any, ...] = field(default=())
    """Sorts the best copy first."""


Pairs = dict[tuple[int, int], tuple[str, float]]
"""(kind, distance) by the numbers of two clips, the smaller first."""


def found_pairs(clips: Sequence[Clip], distance: float, cosine_distance: float) -> Pairs:
    """All pairs of copies that are found, but for those of which neither is of this run.

    distance: the largest between fingerprints; cosine_distance: the largest between embeddings, negative for none.
    """
    found: Pairs = {}
    for kind, of in (
        (EMBEDDING, _by_embedding(clips, cosine_distance)),
        (PERCEPTUAL, _by_volume(clips, distance)),
        (SAME_SOURCE, _equal(clips, [_source(clip) for clip in clips])),
        (EXACT, _equal(clips, [clip.digest for clip in clips])),
    ):
        # The surer kinds come last.
        found |= {pair: (told or kind, apart) for pair, (told, apart) in of.items()}
    return {
        pair: told
        for pair, told in found.items()
        if not (clips[pair[0]].run and clips[pair[1]].run)
    }


def measured(clips: Sequence[Clip], pairs: Sequence[tuple[int, int]]) -> Pairs:
    """The surest kind and the distance of each pair, however far: what joins them may be a copy between.

    Those that nothing can be measured of are left out.
    """
    found: Pairs = {}
    for is_mirrored in (True, False):
        usable = [
            p for p in pairs if clips[p[0]].volume is not None and clips[p[1]].volume is not None
        ]
        apart = _distances(clips, usable, np.full(len(usable), is_mirrored))
        for pair, value in zip(usable, apart.tolist(), strict=True):
            if value <= found.get(pair, ("", np.inf))[1]:
                found[pair] = (MIRRORED if is_mirrored else PERCEPTUAL, value)
    for i, j in pairs:
        a, b = clips[i], clips[j]
        if a.digest and a.digest == b.digest:
            found[i, j] = (EXACT, 0.0)
        elif _source(a) and _source(a) == _source(b):
            found[i, j] = (SAME_SOURCE, 0.0)
        elif (i, j) not in found and a.embedding is not None and b.embedding is not None:
            found[i, j] = (EMBEDDING, _cosine_distance(a.embedding, b.embedding))
    return found


def _cosine_distance(a: np.ndarray, b: np.ndarray) -> float:
    return round(max(0.0, 1 - float(a @ b)), 4)


def _source(clip: Clip) -> tuple[Any, ...] | None:
    return (clip.source_digest, clip.begin, clip.end) if clip.source_digest else None


def _equal(clips: Sequence[Clip], values: Sequence[Any]) -> Pairs:
    """Each clip with the first that has the same value."""
    first: dict[Any, int] = {}
    found: Pairs = {}
    for number, value in enumerate(values):
        if value and (other := first.setdefault(value, number)) != number:
            found[other, number] = ("", 0.0)
    return found


def _by_volume(clips: Sequence[Clip], most: float) -> Pairs:
    numbers = [number for number, clip in enumerate(clips) if clip.volume is not None]
    volumes = [volume for clip in clips if (volume := clip.volume) is not None]
    stacked = np.stack(volumes) if volumes else np.zeros((0, TIMES, SIDE, SIDE), np.uint8)
    rows, turned = pairs_of_volumes(stacked)
    wanted = [
        (numbers[i], numbers[j], is_turned)
        for (i, j), is_turned in zip(rows.tolist(), turned.tolist(), strict=True)
        if _may_be_copies(clips[numbers[i]], clips[numbers[j]])
    ]
    pairs = [(i, j) for i, j, _ in wanted]
    mirrored = np.array([is_turned for *_, is_turned in wanted], bool)
    found: Pairs = {}
    for pair, is_mirrored, apart in zip(
        pairs, mirrored.tolist(), _distances(clips, pairs, mirrored).tolist(), strict=True
    ):
        if apart <= most and apart < found.get(pair, ("", np.inf))[1]:
            found[pair] = (MIRRORED if is_mirrored else PERCEPTUAL, apart)
    return found


def _may_be_copies(a: Clip, b: Clip) -> bool:
    """Whether their lengths allow it; an image is no copy of a video."""
    if (a.run and b.run) or a.kind != b.kind:
        return False
    short, long = sorted((a.duration, b.duration))
    return long <= short * (_SPEED + _FRAMES_AWAY / max(1, min(a.frames, b.frames)))


def _distances(
    clips: Sequence[Clip], pairs: Sequence[tuple[int, int]], mirrored: np.ndarray
) -> np.ndarray:
    """Rounded, so that another machine's last digit does not change what is kept."""
    found = [np.zeros(0)]
    for begin in range(0, len(pairs), 4096):
        part = pairs[begin : begin + 4096]
        left = np.stack([clips[i].volume for i, _ in part])  # type: ignore[misc]
        right = np.stack([clips[j].volume for _, j in part])  # type: ignore[misc]
        found.append(distances(left, right, mirrored[begin : begin + 4096]))
    return np.round(np.concatenate(found), 4)


def _by_embedding(clips: Sequence[Clip], most: float) -> Pairs:
    sizes = {len(clip.embedding) for clip in clips if clip.embedding is not None and not clip.run}
    if not sizes or most < 0:
        return {}
    # Another run's may be those of another model.
    numbers = [
        n for n, c in enumerate(clips) if c.embedding is not None and len(c.embedding) in sizes
    ]
    vectors = np.stack([clips[number].embedding for number in numbers]).astype(np.float32)  # type: ignore[misc]
    found: Pairs = {}
    for i, j in pairs_of_vectors(vectors, 1 - most).tolist():
        found[numbers[i], numbers[j]] = ("", _cosine_distance(vectors[i], vectors[j]))
    return found
