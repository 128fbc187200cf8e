"""The oracle is right on clean, compressed and blurred clips, and can be wrong when it should."""

import io
import random
from collections.abc import Callable

import av
import numpy as np
import pytest

from sora_train.data.decode.video_io import encode_h264
from sora_train.data.shapes import oracle, world
from sora_train.errors import UserError

SCENES = [world.sample_scene(11, index) for index in range(160)]
SCENES += [world.sample_scene(11, index, "held_out") for index in range(40)]
PROMPTS = world.eval_prompts(80, held_out=False, seed=5)


def compressed(clip: np.ndarray) -> np.ndarray:
    """The clip after H.264 as the training files have it: colour at half the resolution."""
    file = io.BytesIO()
    encode_h264(clip, 8, file)
    file.seek(0)
    with av.open(file) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def blurred(clip: np.ndarray, sigma: float, noise: float) -> np.ndarray:
    """Gaussian blur of `sigma` pixels at 48 x 48 and white noise of `noise` 8-bit levels."""
    sigma = sigma * min(clip.shape[1:3]) / 48
    taps = np.exp(-(np.arange(-6, 7) ** 2) / (2 * sigma**2))
    taps /= taps.sum()
    soft = clip.astype(np.float32)
    for axis in (1, 2):
        margins = [(6, 6) if axis == other else (0, 0) for other in range(4)]
        padded = np.pad(soft, margins, mode="edge")
        spans = [np.arange(tap, tap + soft.shape[axis]) for tap in range(len(taps))]
        soft = sum(
            weight * padded.take(span, axis) for weight, span in zip(taps, spans, strict=True)
        )
    soft = soft + np.random.default_rng(0).normal(0, noise, soft.shape)
    return np.clip(soft, 0, 255).astype(np.uint8)


def accuracy(
    scenes: list[world.Scene], damage: Callable[[np.ndarray], np.ndarray]
) -> dict[str, float]:
    """Share of things read right, by factor; `alone` counts clips where nothing else was seen."""
    hits = {"colour": 0, "shape": 0, "motion": 0, "camera": 0, "alone": 0}
    total = 0
    for scene in scenes:
        readings = {reading.colour: reading for reading in oracle.read(damage(world.render(scene)))}
        for thing in scene.things:
            total += 1
            if thing.colour in readings:
                reading = readings[thing.colour]
                hits["colour"] += 1
                hits["shape"] += reading.shape == thing.shape
                hits["motion"] += reading.motion == scene.motion
                hits["camera"] += reading.camera == scene.camera
                hits["alone"] += len(readings) == len(scene.things)
    return {factor: count / total for factor, count in hits.items()}


def test_clean_clips_of_every_size_are_read_right() -> None:
    assert {(scene.height, scene.width) for scene in SCENES} == set(world.FRAME_SIZES)
    found = accuracy(SCENES, lambda clip: clip)
    assert min(found.values()) >= 0.99, found


def test_compressed_clips_of_every_size_are_read_right() -> None:
    # All of the rare sizes, and some of the common one.
    scenes = [s for s in SCENES if (s.height, s.width) != (48, 48)] + SCENES[::8]
    assert {(scene.height, scene.width) for scene in scenes} == set(world.FRAME_SIZES)
    found = accuracy(scenes, compressed)
    assert min(found.values()) >= 0.99, found


def test_blurred_and_noisy_clips_are_read_right() -> None:
    found = accuracy(SCENES[1::3], lambda clip: blurred(clip, 1.0, 6.0))
    assert min(found.values()) >= 0.97, found


def test_heavy_blur_costs_little() -> None:
    found = accuracy(SCENES[2::8], lambda clip: blurred(compressed(clip), 1.5, 6.0))
    assert min(found.values()) >= 0.93, found


def test_scores_are_one_on_the_right_prompts_and_chance_on_shuffled_ones() -> None:
    clips = [world.render(world.scene_of(prompt, seed)) for seed, prompt in enumerate(PROMPTS)]
    assert min(oracle.score(clips, PROMPTS).values()) >= 0.99
    rng = random.Random(0)
    rounds = [oracle.read(clip)[0] for clip in clips]
    shuffled = [rng.sample(PROMPTS, len(PROMPTS)) for _ in range(20)]
    for factor, chance in oracle.CHANCE.items():
        hits = np.mean(
            [
                getattr(reading, factor) == getattr(prompt, factor)
                for prompts in shuffled
                for reading, prompt in zip(rounds, prompts, strict=True)
            ]
        )
        assert abs(hits - chance) < 0.05, (factor, hits)


def test_one_wrong_factor_lowers_that_score_alone() -> None:
    clips = [world.render(world.scene_of(PROMPTS[0], 0))]
    other = next(colour for colour in world.COLOURS if colour != PROMPTS[0].colour)
    wrong = [world.Prompt("", other, PROMPTS[0].shape, PROMPTS[0].motion)]
    assert oracle.score(clips, wrong) == {"colour": 0.0, "shape": 1.0, "motion": 1.0}


@pytest.mark.parametrize(
    ("motion", "backwards"),
    [("left", "right"), ("right", "left"), ("up", "down"), ("down", "up")],
)
def test_time_reversed_motion_is_read_reversed(motion: str, backwards: str) -> None:
    for seed in range(3):
        clip = world.render(world.scene_of(world.Prompt("", "cyan", "cross", motion), seed))
        assert oracle.read(clip)[0].motion == motion
        assert oracle.read(clip[::-1])[0].motion == backwards


def test_a_frozen_clip_is_still_whatever_its_prompt() -> None:
    for prompt in PROMPTS[:24]:
        clip = world.render(world.scene_of(prompt, 2))
        assert oracle.read(np.repeat(clip[:1], 9, axis=0))[0].motion == "still"


def test_mirrored_clips_move_the_other_way_and_pan_the_other_way() -> None:
    panned = [scene for scene in SCENES if scene.camera != "static"][:6]
    assert panned
    for scene in panned:
        reading = oracle.read(world.render(scene)[:, :, ::-1])[0]
        assert reading.camera == {"pan_left": "pan_right", "pan_right": "pan_left"}[scene.camera]
        assert reading.motion == scene.motion


def test_pairs_are_told_apart_and_placed() -> None:
    for scene in [scene for scene in SCENES if scene.relation is not None][:20]:
        by_colour = {reading.colour: reading for reading in oracle.read(world.render(scene))}
        for thing in scene.things:
            reading = by_colour[thing.colour]
            assert abs(reading.x - thing.x) < 0.02 and abs(reading.y - thing.y) < 0.02


def test_where_nothing_is_nothing_is_read() -> None:
    empty = np.full((9, 48, 48, 3), 40, np.uint8)
    assert oracle.read(empty) == []
    assert oracle.score([empty], PROMPTS[:1]) == {"colour": 0.0, "shape": 0.0, "motion": 0.0}


def test_any_pixels_can_be_read() -> None:
    rng = np.random.default_rng(0)
    for shape in [(1, 32, 64, 3), (2, 48, 48, 3), (9, 48, 48, 3)]:
        oracle.read(rng.integers(0, 256, shape, dtype=np.uint8))
        oracle.read(np.broadcast_to(np.array([255, 0, 0], np.uint8), shape))
        flash = np.zeros(shape, np.uint8)
        flash[-1, 5:20, 5:20] = world.COLOURS["green"]
        oracle.read(flash)


def test_what_is_no_clip_is_refused() -> None:
    with pytest.raises(UserError, match="float32"):
        oracle.read(np.zeros((9, 48, 48, 3), np.float32))
    with pytest.raises(UserError, match="1 clips for 0 prompts"):
        oracle.score([np.zeros((9, 48, 48, 3), np.uint8)], [])
