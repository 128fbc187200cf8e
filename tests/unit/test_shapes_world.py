"""Laws of the shapes world: keyed draws, held-out combinations, things that stay in view."""

import dataclasses
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.data.shapes import captions, world
from sora_train.errors import UserError

SCENES = [world.sample_scene(3, index) for index in range(1500)]
HELD_OUT = [world.sample_scene(3, index, "held_out") for index in range(300)]


def factors(scene: world.Scene) -> list[tuple[str, str, str]]:
    return [(thing.shape, thing.colour, scene.motion) for thing in scene.things]


@given(st.integers(0, 10**6), st.integers(0, 1400))
@settings(max_examples=25, deadline=None)
def test_a_scene_depends_on_its_key_alone(seed: int, index: int) -> None:
    scene = world.sample_scene(seed, index)
    world.sample_scene(seed, index + 1)
    assert world.sample_scene(seed, index) == scene
    assert np.array_equal(world.render(scene), world.render(world.sample_scene(seed, index)))


def test_another_seed_split_or_index_is_another_scene() -> None:
    def look(scene: world.Scene) -> world.Scene:
        return dataclasses.replace(scene, key="", held_out=False)

    scene = look(world.sample_scene(3, 5))
    others = [world.sample_scene(4, 5), world.sample_scene(3, 6), world.sample_scene(3, 5, "val")]
    assert all(look(other) != scene for other in others)
    assert len({scene.key for scene in SCENES + HELD_OUT}) == len(SCENES) + len(HELD_OUT)


def test_the_pixels_of_a_known_scene_stay_as_they_were() -> None:
    clip = world.render(world.sample_scene(0, 6))
    assert clip.shape == (9, 48, 48, 3) and clip.dtype == np.uint8
    assert world.sample_scene(0, 6).caption == "a green square moves right, bright light"
    green = (clip == np.array(world.COLOURS["green"])).all(-1).sum(axis=(1, 2))
    assert (abs(green - 400) < 120).all(), green


def test_held_out_combinations_are_never_trained_on() -> None:
    for split in ("train", "val"):
        for index in range(1500):
            scene = world.sample_scene(3, index, split)
            assert not scene.held_out
            assert not any(world.is_held_out(*combination) for combination in factors(scene))
    for scene in HELD_OUT:
        assert scene.held_out
        assert all(world.is_held_out(*combination) for combination in factors(scene))


def test_every_factor_is_trained_on_in_some_combination() -> None:
    seen = [combination for scene in SCENES for combination in factors(scene)]
    for place, values in enumerate((world.SHAPES, world.COLOURS, world.MOTIONS)):
        counts = Counter(combination[place] for combination in seen)
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.05 * len(SCENES)
    share = len(world.combinations(held_out=True)) / (
        len(world.combinations(held_out=True)) + len(world.combinations(held_out=False))
    )
    assert 0.08 < share < 0.2


def test_shares_of_kinds_sizes_and_durations() -> None:
    def share(chosen: list[bool]) -> float:
        return sum(chosen) / len(SCENES)

    assert 0.02 < share([scene.relation is not None for scene in SCENES]) < 0.07
    assert 0.02 < share([scene.num_frames == 1 for scene in SCENES]) < 0.07
    assert 0.02 < share([scene.camera != "static" for scene in SCENES]) < 0.07
    assert share([scene.height == scene.width for scene in SCENES]) > 0.7
    assert {(scene.height, scene.width) for scene in SCENES} == set(world.FRAME_SIZES)
    assert {scene.num_frames for scene in SCENES} == {1, 9, 13, 17}
    assert {scene.fps for scene in SCENES} >= {8.0, 12.0, 16.0}


def test_nothing_undecidable_is_made() -> None:
    for scene in SCENES + HELD_OUT:
        assert all(world.is_decidable(thing.shape, scene.motion) for thing in scene.things)
        if scene.num_frames == 1 or scene.relation is not None:
            assert scene.motion == "still" and scene.camera == "static"
        if scene.camera != "static":
            assert scene.background in world.TEXTURED and scene.motion in world.PAN_MOTIONS
            assert abs(scene.pan) >= world.MIN_TRAVEL
        if scene.motion in ("left", "right", "up", "down", "bounce"):
            assert abs(scene.travel) >= world.MIN_TRAVEL
        if scene.relation is not None:
            first, second = scene.things
            assert first.colour != second.colour
            axis = "x" if scene.relation == "left_of" else "y"
            assert getattr(first, axis) < getattr(second, axis) - 0.4


def test_every_thing_stays_inside_the_frame() -> None:
    for scene in SCENES + HELD_OUT:
        for thing in scene.things:
            path = world.track(scene, thing)
            reach = path.radius * world.SHAPES[thing.shape]
            assert (path.x - reach).min() >= 0 and (path.x + reach).max() <= scene.width
            assert (path.y - reach).min() >= 0 and (path.y + reach).max() <= scene.height


def chroma(clip: np.ndarray) -> np.ndarray:
    """Largest less smallest channel of each pixel, (T, H, W); no background has more than 42."""
    return clip.max(axis=-1).astype(int) - clip.min(axis=-1)


def test_no_thing_is_cut_by_the_border_in_any_frame() -> None:
    """Seen in the pixels, not in the numbers they are drawn from: border pixels are covered in part at most, and
    a thing that does not grow covers the same area all the time."""
    for scene in SCENES[:150] + HELD_OUT[:50]:
        colour = chroma(world.render(scene))
        peak = colour.max()
        edges = [colour[:, 0], colour[:, -1], colour[:, :, 0], colour[:, :, -1]]
        assert max(edge.max() for edge in edges) < 0.8 * peak, scene.key
        area_T = (colour > max(60, 0.5 * peak)).sum(axis=(1, 2))
        assert area_T.min() > 0
        if scene.motion != "grow":
            assert area_T.max() < 1.12 * area_T.min() + 6, scene.key


def test_stated_circumradii_bound_the_shapes() -> None:
    grid = np.linspace(-1.6, 1.6, 400)
    x, y = np.meshgrid(grid, grid)
    for shape, circumradius in world.SHAPES.items():
        inside = world.distance(shape, x, y) < 0
        furthest = np.hypot(x, y)[inside].max()
        assert circumradius - 0.03 < furthest < circumradius
        assert abs(x[inside].mean()) < 1e-9 and abs(y[inside].mean()) < 0.01


@pytest.mark.parametrize("direction", ["left", "right", "up", "down"])
def test_words_agree_with_the_screen(direction: str) -> None:
    scene = world.scene_of(world.Prompt("", "red", "circle", direction), 1)
    path = world.track(scene, scene.things[0])
    step = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[direction]
    assert np.sign(path.x[-1] - path.x[0]) == step[0]
    assert np.sign(path.y[-1] - path.y[0]) == step[1]


def test_captions_are_short_and_say_what_is_seen() -> None:
    for scene in SCENES + HELD_OUT:
        words = scene.caption
        assert 8 <= len(words.encode()) <= captions.MAX_CAPTION_BYTES
        for thing in scene.things:
            assert f"{thing.colour} {thing.shape}" in words
        said = any(action in words for action in captions.ACTIONS[scene.motion])
        assert said == (scene.num_frames > 1 and scene.relation is None)
        if scene.camera != "static":
            assert captions.CAMERAS[scene.camera] in words
        if scene.relation is not None:
            assert captions.RELATIONS[scene.relation] in words
    assert np.median([len(scene.caption) for scene in SCENES]) < 70
    assert len({scene.phrasing for scene in SCENES}) > 0.3 * captions.NUM_PHRASINGS


def test_every_phrasing_of_every_scene_kind_is_within_the_limit() -> None:
    for scene in SCENES[:40]:
        for phrasing in range(captions.NUM_PHRASINGS):
            short = captions.describe(scene, captions.shortened(scene, phrasing))
            assert len(short) <= captions.MAX_CAPTION_BYTES


@pytest.mark.parametrize("held_out", [False, True])
def test_evaluation_prompts_are_balanced_and_on_their_side(held_out: bool) -> None:
    prompts = world.eval_prompts(64, held_out=held_out, seed=1)
    assert prompts == world.eval_prompts(64, held_out=held_out, seed=1)
    assert prompts != world.eval_prompts(64, held_out=held_out, seed=2)
    for prompt in prompts:
        assert world.is_held_out(prompt.shape, prompt.colour, prompt.motion) == held_out
        assert f"{prompt.colour} {prompt.shape}" in prompt.text
        assert any(action in prompt.text for action in captions.ACTIONS[prompt.motion])
    if not held_out:
        for factor, values in (
            ("colour", world.COLOURS),
            ("shape", world.SHAPES),
            ("motion", world.MOTIONS),
        ):
            counts = Counter(getattr(prompt, factor) for prompt in prompts)
            even = len(prompts) / len(values)
            assert all(0.6 * even <= counts[value] <= 1.5 * even for value in values), counts


def test_unknown_split_and_negative_index_are_refused() -> None:
    with pytest.raises(UserError, match="split='test'"):
        world.sample_scene(0, 0, "test")
    with pytest.raises(UserError, match="index=-1"):
        world.sample_scene(0, -1)


def test_the_world_needs_no_torch() -> None:
    code = "import sys, sora_train.data.shapes.oracle; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
