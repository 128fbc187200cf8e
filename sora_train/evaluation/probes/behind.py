"""Objects that pass behind one another: what was hidden comes out again, where its speed has taken it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sora_train.data.shapes.captions import ARTICLE, describe
from sora_train.data.shapes.scene import Prompt, Thing
from sora_train.data.shapes.world import BACKGROUNDS, COLOURS, render, scene_of
from sora_train.evaluation.cases import Case, Sampled
from sora_train.evaluation.probes.blobs import blobs, largest
from sora_train.evaluation.probes.probe import Probe
from sora_train.evaluation.registry import Metric

NAME = "behind"
FROM, WAY = 0.17, 0.66
"""Of the width: where the moving thing begins, and how far it goes; the screen stands in the middle."""
MOVER, SCREEN = 0.1, 0.16
"""Radii."""
HEAD = 2
"""Latent frames that are given: the thing is on its way, and soon out of sight."""


@dataclass(frozen=True)
class Passage:
    mover: str
    screen: str
    area: float
    """Of the mover in the first frame."""
    x: float
    """Of the mover in the last frame, by its law."""


def ask(frames: int, height: int, width: int, fps: float, most: int) -> list[Case]:
    """Extensions of the way of a circle behind a square; too small or too short a clip shows none."""
    if frames < 9 or width < height:
        return []
    colours = tuple(COLOURS)
    cases = []
    for number in range(most):
        mover, screen = colours[number % len(colours)], colours[(number + 2) % len(colours)]
        clip = passage(mover, screen, frames, height, width, fps)
        first = largest(blobs(clip[:1])[0], mover)
        if first is None:
            return []
        scene = scene_of(Prompt("", mover, "circle", "right"), num_frames=frames, fps=fps)
        facts = Passage(mover, screen, first.area, FROM + WAY)
        text = describe(scene, ARTICLE)
        cases.append(Case(NAME, text, "extend", clip, head=HEAD, facts=facts))
    return cases


def passage(
    mover: str, screen: str, frames: int, height: int, width: int, fps: float
) -> np.ndarray:
    """uint8 (F, H, W, 3): a circle goes to the right, behind a square that stands still."""
    scene = scene_of(
        Prompt("", mover, "circle", "right"),
        num_frames=frames,
        fps=fps,
        height=height,
        width=width,
    )
    scene = replace(scene, background="dark", lighting="bright", style="flat", travel=WAY)
    circle = Thing("circle", mover, "small", FROM, 0.5, 0.0, MOVER)
    square = Thing("square", screen, "small", 0.5, 0.5, 0.0, SCREEN)
    behind = render(replace(scene, things=(circle,)))
    front = render(replace(scene, things=(square,), motion="still"))
    ground = np.asarray(BACKGROUNDS["dark"][0], np.uint8)
    covered = (front != ground).any(axis=-1, keepdims=True)
    return np.where(covered, front, behind)


def measure(sampled: Sampled) -> dict[str, float]:
    facts, last = sampled.case.facts, blobs(sampled.clip[-1:])[0]
    mover, screen = largest(last, facts.mover), largest(last, facts.screen)
    back = mover is not None and screen is not None and mover.area > facts.area / 2
    found = {"behind_returns": float(back)}
    if mover is not None:
        found["behind_path"] = abs(mover.x - facts.x)
    return found


BEHIND = Probe(
    NAME,
    {
        "behind_returns": Metric(
            "a", "share", "higher", "clips in which the hidden thing is in sight again at the end"
        ),
        "behind_path": Metric(
            "a", "widths", "lower", "how far it is then from where its speed had taken it"
        ),
    },
    ask,
    measure,
)
