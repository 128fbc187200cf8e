"""Bounces whose speed must hold: height follows |sin|, so a thing comes back as fast as it went."""

from __future__ import annotations

import numpy as np

from sora_train.data.shapes.captions import ARTICLE, describe
from sora_train.data.shapes.scene import Prompt
from sora_train.data.shapes.world import COLOURS, EARLY, SHAPES, scene_of
from sora_train.evaluation.cases import Case, Sampled
from sora_train.evaluation.probes.blobs import blobs, largest
from sora_train.evaluation.probes.probe import Probe
from sora_train.evaluation.registry import Metric

NAME = "bounce"
LEAST = 0.08
"""Of the frame's height: what moves less has not bounced."""


def ask(frames: int, height: int, width: int, fps: float, most: int) -> list[Case]:
    colours, shapes = tuple(COLOURS), tuple(SHAPES)
    cases = []
    for number in range(most if frames > 1 else 0):
        colour, shape = colours[number % len(colours)], shapes[number % len(shapes)]
        prompt = Prompt("", colour, shape, "bounce")
        scene = scene_of(prompt, num_frames=frames, fps=fps)
        cases.append(Case(NAME, describe(scene, ARTICLE), facts=colour))
    return cases


def measure(sampled: Sampled) -> dict[str, float]:
    """How well the height follows the law, and how even its speeds are; 0 for what does not bounce or is lost."""
    found = [largest(of_frame, sampled.case.facts) for of_frame in blobs(sampled.clip)]
    y_F = np.array([np.nan if blob is None else blob.y for blob in found])
    seconds_F = np.arange(len(y_F)) / sampled.fps
    if np.isnan(y_F).any() or np.ptp(y_F) < LEAST or seconds_F[-1] < 0.5:
        return {"bounce_fit": 0.0, "bounce_speed": 0.0}
    phases = np.linspace(-EARLY, EARLY, 33)
    fit = max(_fit(y_F, np.abs(np.sin(np.pi * (seconds_F + phase)))) for phase in phases)
    return {"bounce_fit": fit, "bounce_speed": _evenness(y_F)}


def _fit(y_F: np.ndarray, law_F: np.ndarray) -> float:
    """Share of the variance of y that a + b * law explains."""
    return float(np.corrcoef(y_F, law_F)[0, 1] ** 2) if np.ptp(law_F) > 0 else 0.0


def _evenness(y_F: np.ndarray) -> float:
    """The greatest speed of the slowest way, up or down, over that of the fastest; a single step is no way."""
    steps_F = np.diff(y_F)
    turns = np.flatnonzero(np.diff(np.sign(steps_F))) + 1
    ways = [way for way in np.split(np.abs(steps_F), turns) if len(way) > 1]
    speeds = [float(way.max()) for way in ways]
    return min(speeds) / max(speeds) if len(speeds) > 1 else 0.0


BOUNCE = Probe(
    NAME,
    {
        "bounce_fit": Metric(
            "a", "1", "higher", "share of the height's variance that the bounce's law explains"
        ),
        "bounce_speed": Metric(
            "a",
            "1",
            "higher",
            "top speed of a bounce's slowest way, up or down, over the fastest's",
        ),
    },
    ask,
    measure,
)
