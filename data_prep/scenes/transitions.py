"""From signals to transitions: hard cuts, dissolves and fades, each judged by what lies a few seconds around it.

Nothing here looks farther than `reach`, so the parts of a source have the transitions of one that is read whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from data_prep.scenes.signals import Signals
from sora_train.config.sections.base import Section

NEIGHBOURS = 6
"""Samples on each side with whose changes one is compared."""
AROUND = 2
"""Samples by which TransNetV2 may be off, and within which two findings are one."""


class Thresholds(Section):
    """From where on something is a transition."""

    cut_probability: float = Field(0.5, gt=0, le=1)
    """Of TransNetV2 that a scene ends with a frame."""
    gradual_probability: float = Field(0.3, gt=0, le=1)
    """Of TransNetV2 that a frame belongs to a dissolve or fade, at its surest frame."""
    gradual_edge: float = Field(0.5, gt=0, le=1)
    """The same at its first and last frame."""
    cut_change: float = Field(18.0, gt=0)
    """Mean difference of two frames in levels of 255, from which on it may be a cut."""
    cut_ratio: float = Field(3.0, ge=1)
    """How many times larger than the changes around it a cut's is."""
    fade_contrast: float = Field(6.0, gt=0)
    """Standard deviation of the brightness in levels of 255, below which a picture is of one colour."""
    max_seconds: float = Field(3.0, gt=0.2)
    """The longest dissolve or fade; what changes more slowly is part of a scene."""


@dataclass(frozen=True)
class Transition:
    """Steps [begin, end) of samples that belong to no scene; of a cut both are the next scene's first."""

    begin: int
    end: int
    kind: str
    score: float


def reach(settings: Thresholds, rate: float) -> int:
    """Samples before and after one that decide what it is."""
    return math.ceil(settings.max_seconds * rate) + 2 * NEIGHBOURS


def transitions(
    found: Signals, settings: Thresholds, rate: float, detector: str
) -> Iterator[Transition]:
    """In order of time; those whose begin lies within `reach` of the signals' ends may be wrong."""
    gradual = list(_gradual(found, settings, rate))
    taken = np.zeros(len(found.time), bool)
    for one in gradual:
        taken[max(0, one.begin - found.first - 1) : one.end - found.first + 2] = True
    cuts = [cut for cut in _cuts(found, settings, detector) if not taken[cut.begin - found.first]]
    yield from sorted([*gradual, *cuts], key=lambda one: (one.begin, one.end))


def _gradual(found: Signals, settings: Thresholds, rate: float) -> Iterator[Transition]:
    """Runs of samples that TransNetV2 holds for parts of a transition; of a hard cut they are one or two."""
    for begin, end in runs(found.within >= settings.gradual_edge):
        score = found.within[begin:end].max()
        if (
            3 <= end - begin <= settings.max_seconds * rate
            and score >= settings.gradual_probability
        ):
            is_plain = found.contrast[begin:end].min() < settings.fade_contrast
            yield Transition(
                found.first + begin,
                found.first + end,
                "fade" if is_plain else "dissolve",
                float(score),
            )


def runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """[begin, end) of the stretches of a bool (N,) that are true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _cuts(found: Signals, settings: Thresholds, detector: str) -> Iterator[Transition]:
    """Of findings as near as `AROUND` the surest, where the picture changes most."""
    score = np.zeros(len(found.time))
    if detector in ("joined", "transnetv2"):
        score[1:] = np.where(found.ends >= settings.cut_probability, found.ends, 0.0)[:-1]
    if detector in ("joined", "difference"):
        score = np.maximum(score, _changed(found, settings))
    if detector == "pyscenedetect":
        score = found.stepped.astype(np.float64)
    cuts: dict[int, Transition] = {}
    for step in np.flatnonzero(score > 0).tolist():
        around = slice(max(0, step - AROUND), step + AROUND + 1)
        if step == around.start + int(np.argmax(score[around])):
            at = found.first + around.start + int(np.argmax(found.change[around]))
            cuts.setdefault(at, Transition(at, at, "cut", float(score[step])))
    yield from cuts.values()


def _changed(found: Signals, settings: Thresholds) -> np.ndarray:
    """float (N,): above 0 where a sample differs from the one before much more than its neighbours do."""
    changes = found.change
    padded = np.pad(changes, NEIGHBOURS)
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * NEIGHBOURS + 1)
    others = np.delete(around, NEIGHBOURS, axis=1)
    # The largest neighbour may be another cut.
    usual = np.sort(others, axis=1)[:, -2]
    ratio = changes / np.maximum(usual, 1e-3)
    is_cut = (changes >= settings.cut_change) & (ratio >= settings.cut_ratio)
    is_cut &= found.lasting >= settings.cut_change
    return np.where(is_cut, 1 - 1 / np.maximum(ratio, 1), 0.0)
