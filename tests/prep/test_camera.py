"""The camera's movement is found of what most of the picture does, and named as the one behind the camera would."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.footage import CAMERAS, Shot
from data_prep.scores.camera import (
    OUTLIER_PIXELS,
    STILL,
    WORDS,
    Fit,
    _corners,
    _tracked,
    camera_of,
    fit,
)
from data_prep.scores.motion import Motion, smoothness
from data_prep.scores.passing import SHORT_SIDE, SmallFrame
from tests.prep.scored import filmed, only

HEIGHT, WIDTH = SHORT_SIDE, 256
CENTRE = np.array([(WIDTH - 1) / 2, (HEIGHT - 1) / 2])


def scene(seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).random((HEIGHT, WIDTH), dtype=np.float32)
    blurred = cv2.GaussianBlur(noise, (0, 0), 3)
    return cv2.normalize(blurred, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def moved(picture: np.ndarray, x: float, y: float, zoom: float, roll: float) -> np.ndarray:
    """A picture after a similarity about its centre; x and y in pixels."""
    cosine, sine = math.exp(zoom) * math.cos(roll), math.exp(zoom) * math.sin(roll)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    matrix = np.column_stack([turn, CENTRE - turn @ CENTRE + [x, y]])
    return cv2.warpAffine(
        picture, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101
    )


pixels = st.floats(-12, 12)


@given(x=pixels, y=pixels, zoom=st.floats(-0.06, 0.06), roll=st.floats(-0.06, 0.06))
@example(x=0.0, y=0.0, zoom=0.0, roll=0.0)
@settings(max_examples=25, deadline=None)
def test_a_known_movement_is_found(x, y, zoom, roll):
    found = fit(scene(), moved(scene(), x, y, zoom, roll), 0.125)
    assert found is not None and found.seconds == 0.125
    assert found.x * SHORT_SIDE == pytest.approx(x, abs=0.25)
    assert found.y * SHORT_SIDE == pytest.approx(y, abs=0.25)
    assert found.zoom == pytest.approx(zoom, abs=0.003)
    assert found.roll == pytest.approx(roll, abs=0.003)


def test_what_moves_otherwise_before_the_background_is_left_out():
    before, after = scene(), moved(scene(), 4, 0, 0, 0)
    before[30:100, 60:140] = scene(1)[30:100, 60:140]
    after[36:106, 50:130] = scene(1)[30:100, 60:140]
    found = fit(before, after, 1.0)
    assert found is not None
    assert found.x * SHORT_SIDE == pytest.approx(4, abs=0.2)
    assert found.y == pytest.approx(0, abs=0.002)


def test_the_flow_of_a_fit_carries_the_picture_along():
    movement = Fit(0.125, 5 / SHORT_SIDE, -3 / SHORT_SIDE, 0.03, 0.04)
    flow = movement.flow(HEIGHT, WIDTH)
    after = moved(scene(), 5, -3, 0.03, 0.04)
    rows, columns = np.mgrid[40:100, 60:200].astype(np.float32)
    there = flow[40:100, 60:200]
    carried = cv2.remap(after, columns + there[..., 0], rows + there[..., 1], cv2.INTER_CUBIC)
    assert np.abs(carried.astype(float) - scene()[40:100, 60:200]).mean() < 2


def test_a_picture_of_one_colour_has_no_camera():
    grey = np.full((HEIGHT, WIDTH), 90, np.uint8)
    assert fit(grey, grey, 1.0) is None
    assert camera_of([]) == (None, None)


def series(count: int = 24, seconds: float = 0.125, **speeds: float) -> list[Fit]:
    """Fits of an even movement, its speeds a second."""
    steps = {name: speeds.get(name, 0.0) * seconds for name in ("x", "y", "zoom", "roll")}
    return [Fit(seconds, **steps) for _ in range(count)]


@pytest.mark.parametrize(
    ("speeds", "word", "strength"),
    [
        ({}, "static", 0.0),
        ({"x": 0.2, "y": 0.05}, "pan_left", 0.2),
        ({"x": -0.2}, "pan_right", 0.2),
        ({"y": 0.2}, "tilt_up", 0.2),
        ({"y": -0.2, "x": -0.1}, "tilt_down", 0.2),
        ({"zoom": 0.2}, "zoom_in", 0.1),
        ({"zoom": -0.2, "x": 0.05}, "zoom_out", 0.1),
        ({"roll": 0.2}, "roll", 0.1),
        ({"roll": -0.2, "zoom": 0.1}, "roll", 0.1),
        ({"x": STILL / 2}, "static", STILL / 2),
    ],
)
@pytest.mark.parametrize("seconds", [0.125, 0.5])
def test_the_largest_movement_names_the_clip(speeds, word, strength, seconds):
    found, measured = camera_of(series(seconds=seconds, **speeds))
    assert (found, measured) == (word, pytest.approx(strength))
    assert found in WORDS == CAMERAS


def test_what_goes_to_and_fro_is_shaking_unless_a_movement_is_larger():
    swaying = [
        Fit(0.125, step * 0.02, 0.0, 0.0, 0.0) for step in (1, -1, 0, 1, -1, -1, 1, 0, -1, 1) * 3
    ]
    assert camera_of(swaying)[0] == "shake"
    panned = [Fit(f.seconds, f.x - 0.06, 0.0, 0.0, 0.0) for f in swaying]
    assert camera_of(panned)[0] == "pan_right"


def test_a_single_pair_and_a_short_clip_have_a_camera_too():
    assert camera_of(series(1, x=-0.3)) == ("pan_right", pytest.approx(0.3))
    assert camera_of(series(3, y=0.3))[0] == "tilt_up"


@pytest.mark.parametrize("camera", CAMERAS)
def test_footage_is_named_by_the_camera_that_filmed_it(camera, tmp_path):
    found = filmed(tmp_path / "a.mp4", Shot(seed=11, seconds=2, camera=camera), only("motion"))
    assert found["camera"] == camera
    if camera == "static":
        assert found["camera_strength"] < STILL / 4
        assert 0.9 * found["motion"] < found["object_motion"] <= found["motion"]
    elif camera != "shake":
        assert found["object_motion"] < 0.6 * found["motion"]
        assert found["motion_smoothness"] > 0.9


@pytest.mark.parametrize("fps", [12.0, 60.0])
def test_speeds_do_not_depend_on_the_frame_rate(fps, tmp_path):
    shot = Shot(seed=4, seconds=2, camera="pan_right")
    found, usual = (
        filmed(tmp_path / f"{rate:g}.mp4", shot, only("motion"), fps=rate) for rate in (fps, 24.0)
    )
    assert found["camera"] == usual["camera"]
    for name in ("motion", "camera_strength"):
        assert found[name] == pytest.approx(usual[name], rel=0.1)


def still_frame(grey: np.ndarray, time: float) -> SmallFrame:
    return SmallFrame(time, 0.125, np.repeat(grey[..., None], 3, -1), grey, is_tick=True)


def test_motion_counts_short_sides_a_second():
    motion = Motion()
    for number in range(5):
        motion.see(still_frame(np.roll(scene(), 6 * number, 1), number / 8))
    found = motion.scores()
    # The strip that comes in anew counts with whatever flow is seen there.
    assert found["motion"] == pytest.approx(6 * 8 / SHORT_SIDE, rel=0.1)
    assert found["object_motion"] < 0.15 * found["motion"]
    assert found["motion_smoothness"] > 0.97
    assert found["camera_strength"] == pytest.approx(6 * 8 / SHORT_SIDE, rel=0.01)


def test_where_nothing_moves_it_does_not_do_so_evenly():
    motion = Motion()
    for number in range(5):
        motion.see(still_frame(scene(), number / 8))
    found = motion.scores()
    assert found["motion"] < 1e-3 and found["motion_smoothness"] is None
    assert found["camera"] == "static"


def test_points_that_are_covered_are_known_to_be_lost():
    before, after = scene(), scene()
    after[:, 128:] = scene(1)[:, 128:]
    points = _corners(before)
    _, error = _tracked(before, after, points)
    is_covered = points[:, 0, 0] > 140
    assert (error[~is_covered & (points[:, 0, 0] < 116)] < 0.1).all()
    assert (error[is_covered] > OUTLIER_PIXELS).mean() > 0.5


def test_smoothness_is_one_of_even_speed_and_zero_of_every_other_frame():
    assert smoothness(np.ones(9)) == 1
    assert smoothness(np.array([0.0, 1.0] * 500)) == pytest.approx(0, abs=0.01)
    assert smoothness(np.linspace(1, 2, 50)) > 0.98
    assert smoothness(np.ones(1)) is None


@pytest.mark.slow
def test_cameras_of_unseen_footage(tmp_path):
    names = {
        (camera, seed): 600 + 37 * seed + n for n, camera in enumerate(CAMERAS) for seed in range(8)
    }
    wrong = []
    for (camera, seed), number in names.items():
        extra = ({}, {"overlay": True}, {"text": "Evening news"}, {"exposure": 0.6}, {"blur": 1.0})[
            seed % 5
        ]
        shot = Shot(number, 2 + seed % 4, camera, **extra)
        path = Path(tmp_path / "clip.mp4")
        found = filmed(path, shot, only("motion"), crf=(18, 23, 28)[seed % 3])
        if found["camera"] != camera:
            wrong.append((camera, seed, found["camera"], found["camera_strength"]))
    print(f"camera: {len(names) - len(wrong)} of {len(names)} right; {wrong}")
    assert len(wrong) <= 0.05 * len(names)
