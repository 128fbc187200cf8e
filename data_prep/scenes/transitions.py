"""From signals to transitions: hard cuts, dissolves and fades, each judged by what lies a few seconds around it.

Nothing here looks farther than `reach`, so the parts of a source have the transitions of one that is read whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from data_prep.scenes.gradual import HALVES, Span, faded, mixed, probable
from data_prep.scenes.signals import Signals
from sora_train.config.sections.base import Section

NEIGHBOURS = 6
"""Samples on each side with whose changes one is compared."""
AROUND = 2
"""Samples by which TransNetV2 may be off, and within which two findings are one."""
LAG = 2
"""Samples before and after a cut that differ as well: a flash of light comes back to what was there."""


class Thresholds(Section):
    """From where on something is a transition."""

    cut_probability: float = Field(0.5, gt=0, le=1)
    """Of TransNetV2 that a scene ends with a frame."""
    cut_change: float = Field(18.0, gt=0)
    """Mean difference of two frames in levels of 255, from which on it may be a cut."""
    cut_ratio: float = Field(4.0, ge=1)
    """How many times larger than those of the calmer side of it, before or after, a cut's change is."""
    cut_ratio_of_both: float = Field(1.8, ge=1)
    """How many times larger than those of the other side."""
    gradual_probability: float = Field(0.4, gt=0, le=1)
    """Of TransNetV2 that a frame belongs to a dissolve or fade, at its surest frame."""
    gradual_edge: float = Field(0.5, gt=0, le=1)
    """The share of that to which it falls at the first and last frame."""
    mixed_probability: float = Field(0.05, ge=0, le=1)
    """The same of frames that are found to be a mixture: where both agree, less is enough."""
    mixed_variance: float = Field(0.75, gt=0, lt=1)
    """Variance of a picture against those before and behind it, below which it may be a mixture; of two it is 0.5."""
    mixed_error: float = Field(0.4, gt=0, lt=0.5)
    """How far it is from their mean, against how far they are apart; at a cut it is 0.5."""
    fade_contrast: float = Field(5.0, gt=0)
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
    """Samples before and after one that decide what it is: two transitions that are joined, and what is around."""
    return math.ceil((2 * settings.max_seconds + HALVES[-1]) * rate) + 2 * NEIGHBOURS


def transitions(
    found: Signals, settings: Thresholds, rate: float, detector: str
) -> Iterator[Transition]:
    """In order of time; those within `reach` of the signals' ends may be wrong where these are not the source's."""
    gradual = list(_gradual(found, settings, rate, detector))
    taken = np.zeros(len(found.time), bool)
    for one in gradual:
        taken[max(0, one.begin - found.first - 1) : one.end - found.first + 2] = True
    cuts = [cut for cut in _cuts(found, settings, detector) if not taken[cut.begin - found.first]]
    yield from sorted([*gradual, *cuts], key=lambda one: (one.begin, one.end))


def _gradual(
    found: Signals, settings: Thresholds, rate: float, detector: str
) -> Iterator[Transition]:
    longest = round(settings.max_seconds * rate)
    spans: list[Span] = []
    if detector in ("joined", "transnetv2"):
        spans += probable(
            found.within, settings.gradual_probability, settings.gradual_edge, longest
        )
    if detector in ("joined", "difference"):
        is_break = (_changed(found, settings) > 0) | (found.contrast < settings.fade_contrast)
        mixtures = mixed(
            found.coarse, rate, settings.mixed_variance, settings.mixed_error, is_break
        )
        least = settings.mixed_probability if detector == "joined" else 0.0
        spans += [s for s in mixtures if found.within[s.begin : s.end].max() >= least]
    # TransNetV2 sees two transitions where a picture goes into black and another comes out of it.
    spans += faded(found.contrast, settings.fade_contrast, longest)
    for span in _united(spans):
        is_plain = found.contrast[span.begin : span.end].min() < settings.fade_contrast
        kind = "fade" if is_plain else "dissolve"
        yield Transition(found.first + span.begin, found.first + span.end, kind, span.score)


def _united(spans: Iterable[Span]) -> Iterator[Span]:
    """Spans that overlap as one."""
    last: Span | None = None
    for span in sorted(spans, key=lambda one: (one.begin, one.end)):
        if last is not None and span.begin < last.end:
            last = Span(last.begin, max(last.end, span.end), max(last.score, span.score))
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


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
    padded = np.pad(found.change, NEIGHBOURS)
    around = np.lib.stride_tricks.sliding_window_view(padded, 2 * NEIGHBOURS + 1)
    # The largest change of a side may be another cut's.
    sides = around[:, :NEIGHBOURS], around[:, NEIGHBOURS + 1 :]
    usual = np.stack([np.sort(side, axis=1)[:, -2] for side in sides])
    ratio = found.change / np.maximum(usual.min(axis=0), 1e-3)
    is_cut = (found.change >= settings.cut_change) & (ratio >= settings.cut_ratio)
    is_cut &= found.change >= settings.cut_ratio_of_both * usual.max(axis=0)
    score = np.zeros(len(ratio))
    for step in np.flatnonzero(is_cut).tolist():
        if _lasts(found.coarse, step, settings.cut_change / 2):
            score[step] = 1 - 1 / max(float(ratio[step]), 1.0)
    return score


def _lasts(coarse: np.ndarray, step: int, least: float) -> bool:
    """Whether the samples before a step differ from those behind it too."""
    before = coarse[max(0, step - 1 - LAG) : step].astype(np.float32)
    behind = coarse[step : step + 1 + LAG].astype(np.float32)
    return bool(np.abs(before[:, None] - behind[None]).mean(axis=2).min() >= least)
