"""Which decoder reads which clips fastest: measured once, when a source is indexed, and kept in its manifest.

Clips are of a kind by their codec and the manifest's column `coding`, and are asked for in three patterns. Another
decoder than PyAV counts for a kind where it shows PyAV's pixels, to the last bit, in every pattern of every clip
that is tried. So a run's pixels do not depend on what was measured, nor on which decoders are installed.
"""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sora_train.base.progress import Progress
from sora_train.data.decode import decord as decode_decord
from sora_train.data.decode.frames import LIGHT_BYTES, TimedRequest
from sora_train.data.decode.pool import DecodePool, worker_of
from sora_train.data.manifest import DecoderTimes, Manifest
from sora_train.data.sample import Failure
from sora_train.data.storage.remote import is_remote
from sora_train.errors import Fault

STILL, RUN, SPREAD = "still", "run", "spread"
OTHERS = ("decord", "torchcodec")
# Frames asked for that are no further apart, in frames of the clip, are a run.
RUN_FRAMES = 2.5
# Another decoder has to save this share of PyAV's time: less is within what a machine's other work does to it.
WORTH = 0.1
# Of each kind; the time that all measuring may begin in.
CLIPS, TURNS, SECONDS = 2, 2, 5.0
# As many frames as a short bucket has, at a size that is trained.
_FRAMES, _SIDE = 9, 256


def pattern_of(times: Sequence[float], fps: float) -> str:
    """How a request's times lie in a clip of `fps`: STILL, RUN or SPREAD."""
    if len(times) == 1:
        return STILL
    return RUN if (times[1] - times[0]) * fps <= RUN_FRAMES else SPREAD


def kind_of(manifest: Manifest, row: int) -> str:
    """The kind of a row in the times of decoders."""
    return f"{manifest.codec[row]} {manifest.coding[row]}"


def fastest(times: Mapping[str, float]) -> str:
    """The decoder that a pattern's times speak for; PyAV where none were measured."""
    if not times:
        return "pyav"
    best = min(times, key=lambda name: (times[name], name))
    return best if times[best] <= (1 - WORTH) * times["pyav"] else "pyav"


def installed() -> list[str]:
    """The decoders besides PyAV that are there."""
    return [name for name in OTHERS if importlib.util.find_spec(name) is not None]


def measured(manifest: Manifest, timeout: float, *, show: bool = False) -> Manifest:
    """The manifest with the times of decoders of its kinds that had none yet.

    Left out are light clips, which PyAV is quickest to open, clips with traits, which PyAV reads, and clips that lie
    on a server. `timeout` is a clip's deadline in seconds. Kinds are measured from the most frequent on, for some
    SECONDS.
    """
    others, found = installed(), dict(manifest.decoders)
    kinds = _rows_by_kind(manifest, found)
    manifest.decoders = found
    if not others or not kinds:
        return manifest
    program = worker_of("torchcodec" if "torchcodec" in others else "pyav")
    with (
        DecodePool(1, timeout, module=program) as pool,
        Progress(len(kinds), "measuring decoders", enabled=show) as progress,
    ):
        ends = float("inf")
        for done, (kind, rows) in enumerate(kinds.items(), start=1):
            try:
                found[kind] = _times(pool, manifest, rows, ["pyav", *others])
            except Fault:
                # The storage is the run's to complain of; torchcodec may not load.
                return manifest
            progress.update(done)
            # The first kind pays for the process's start.
            ends = min(ends, time.monotonic() + SECONDS)
            if time.monotonic() > ends:
                break
    return manifest


def _rows_by_kind(manifest: Manifest, known: DecoderTimes) -> dict[str, list[int]]:
    """Some rows of each kind that is to be measured, the most frequent kind first."""
    asked = (manifest.drop_reason == "") & (manifest.traits == "") & (manifest.coding != "")
    rows = [row for row in np.flatnonzero(asked).tolist() if manifest.length[row] > LIGHT_BYTES]
    kinds = [kind_of(manifest, row) for row in rows]
    of_kind: dict[str, list[int]] = {
        kind: [] for kind, _ in Counter(kinds).most_common() if kind not in known
    }
    for row, kind in zip(rows, kinds, strict=True):
        if len(of_kind.get(kind, [0] * CLIPS)) < CLIPS and not is_remote(manifest.path(row)):
            of_kind[kind].append(row)
    return {kind: rows for kind, rows in of_kind.items() if rows}


def _times(
    pool: DecodePool, manifest: Manifest, rows: Sequence[int], decoders: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Seconds of a core of each pattern by decoder, over the rows; none for one that fails or shows other pixels.

    `rows` are of one codec, `decoders` begin with PyAV.
    """
    seconds: dict[str, dict[str, float]] = {}
    failed = {"decord"} if manifest.codec[rows[0]] in decode_decord.UNREADABLE_CODECS else set()
    for row in rows:
        for pattern, request in _requests(manifest, row).items():
            best: dict[str, float] = {}
            for _ in range(TURNS):
                # PyAV's come first, and the others' are compared with them.
                ours: np.ndarray | None = None
                for name in decoders:
                    if name in failed:
                        continue
                    answer = pool.submit(replace(request, backend=name)).result()
                    if isinstance(answer, Failure):
                        failed.add(name)
                        continue
                    spent, frames = answer
                    ours = frames if ours is None else ours
                    best[name] = min(spent, best.get(name, spent))
                    if not np.array_equal(ours, frames):
                        failed.add(name)
            totals = seconds.setdefault(pattern, {})
            for name, spent in best.items():
                totals[name] = totals.get(name, 0.0) + spent
    if "pyav" in failed:
        return {}
    return {
        pattern: {name: round(spent, 6) for name, spent in totals.items() if name not in failed}
        for pattern, totals in seconds.items()
    }


def _requests(manifest: Manifest, row: int) -> dict[str, TimedRequest]:
    """A request of each pattern for a row."""
    frames, fps = int(manifest.frames[row]), float(manifest.fps[row]) or 1.0
    shown = (int(manifest.height[row]), int(manifest.width[row]))
    scale = min(1.0, _SIDE / min(shown))
    count = min(frames, _FRAMES)
    begin = (frames - count) // 2
    numbers = {
        STILL: np.array([frames // 2]),
        RUN: np.arange(begin, begin + count),
        SPREAD: np.linspace(0, frames - 1, count).astype(int),
    }
    return {
        pattern: TimedRequest(
            row=row,
            key=str(manifest.key[row]),
            path=manifest.path(row),
            offset=int(manifest.offset[row]),
            length=int(manifest.length[row]),
            kind=str(manifest.kind[row]),
            times=tuple((chosen / fps).tolist()),
            crop=(0, 0, *shown),
            shown=shown,
            height=max(1, round(scale * shown[0])),
            width=max(1, round(scale * shown[1])),
            start=float(manifest.start[row]),
            fps=fps,
        )
        for pattern, chosen in numbers.items()
    }
