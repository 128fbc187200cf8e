"""Counts that must stay: a clip of two things shows two in every frame, one of one shows one."""

from __future__ import annotations

from dataclasses import replace

from sora_train.data.shapes.captions import ARTICLE, describe
from sora_train.data.shapes.scene import Prompt, Scene, Thing
from sora_train.data.shapes.world import COLOURS, SHAPES, scene_of
from sora_train.evaluation.cases import Case, Sampled
from sora_train.evaluation.probes.blobs import blobs
from sora_train.evaluation.probes.probe import Probe
from sora_train.evaluation.registry import Metric

NAME = "count"


def ask(frames: int, height: int, width: int, fps: float, most: int) -> list[Case]:
    """Pairs and single things in turn, no combination twice."""
    colours, shapes = tuple(COLOURS), tuple(SHAPES)
    cases = []
    for number in range(most):
        colour, shape = colours[number % len(colours)], shapes[number % len(shapes)]
        scene = scene_of(Prompt("", colour, shape, "still"), num_frames=frames, fps=fps)
        count = 1 + number % 2
        if count == 2:
            scene = _pair(scene, colours[(number + 2) % len(colours)], height, width)
        cases.append(Case(NAME, describe(scene, ARTICLE), facts=count))
    return cases


def _pair(scene: Scene, colour: str, height: int, width: int) -> Scene:
    relation = "above" if height > width else "left_of"
    first = scene.things[0]
    other = Thing(first.shape, colour, first.size, first.x, first.y, first.angle, first.radius)
    return replace(scene, things=(first, other), relation=relation)


def measure(sampled: Sampled) -> dict[str, float]:
    counts = [len(found) for found in blobs(sampled.clip)]
    right = [count == sampled.case.facts for count in counts]
    return {"count_holds": sum(right) / len(right)}


COUNT = Probe(
    NAME,
    {
        "count_holds": Metric(
            "a", "share", "higher", "frames that show as many things as the prompt asks for"
        )
    },
    ask,
    measure,
)
