"""Each metric on clips made for it: a known flicker, a known drift, a known seam."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_train.evaluation import metrics

FPS = 8.0


def plain(*levels: float, side: int = 8) -> np.ndarray:
    """A clip whose frames are grey, each of one level."""
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def noise(frames: int = 6, side: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, side, side, 3), np.uint8)


@given(st.integers(0, 255), st.integers(0, 255), st.integers(2, 9))
def test_a_known_flicker(low: int, high: int, frames: int):
    clip = plain(*[(low, high)[i % 2] for i in range(frames)])
    change = abs(high - low)
    assert metrics.flicker(clip) == pytest.approx(1 - change / 255)
    assert metrics.motion_energy(clip, FPS) == pytest.approx(change * FPS)
    if frames > 2:
        assert metrics.smoothness(clip) == pytest.approx(1 - change / 255)


def test_flicker_is_what_vbench_computes():
    # vbench/temporal_flickering.py: (255 - mean over pairs of mean(cv2.absdiff)) / 255
    cv2 = pytest.importorskip("cv2")
    clip = noise()
    pairs = zip(clip[:-1], clip[1:], strict=True)
    theirs = (255.0 - np.mean([np.mean(cv2.absdiff(a, b)) for a, b in pairs])) / 255.0
    assert metrics.flicker(clip) == pytest.approx(theirs)


def test_an_even_fade_is_smooth_and_moves():
    clip = plain(*range(0, 100, 10))
    assert metrics.smoothness(clip) == 1
    assert metrics.motion_energy(clip, FPS) == 10 * FPS


def test_energy_does_not_hang_on_the_rate():
    slow, fast = plain(0, 20, 40, 60), plain(0, 10, 20, 30, 40, 50, 60)
    assert metrics.motion_energy(slow, 4) == metrics.motion_energy(fast, 8) == 80


def test_a_known_drift_of_the_mean():
    found = metrics.drift(plain(*range(100, 130, 3)), FPS)
    assert found["drift_mean"] == pytest.approx(3 * FPS)
    assert found["drift_contrast"] == found["drift_saturation"] == found["drift_sharpness"] == 0


def test_a_known_drift_of_contrast_and_sharpness():
    # Columns 128 - k and 128 + k by turns: deviation k, and 2k from each to the next, none downwards.
    spread = np.arange(1, 11)
    columns = 128 + spread[:, None, None, None] * np.array([-1, 1] * 4)[:, None]
    clip = np.broadcast_to(columns, (10, 8, 8, 3)).astype(np.uint8)
    found = metrics.drift(clip, FPS)
    assert found["drift_contrast"] == pytest.approx(FPS, rel=1e-4)
    assert found["drift_sharpness"] == pytest.approx(FPS, rel=1e-4)
    assert found["drift_mean"] == pytest.approx(0, abs=1e-3)


def test_a_known_drift_of_saturation():
    clip = plain(*[100] * 5)
    clip[..., 0] = (100 + 4 * np.arange(5))[:, None, None]
    assert metrics.drift(clip, FPS)["drift_saturation"] == pytest.approx(4 * FPS)


def test_one_frame_neither_moves_nor_drifts():
    one = noise(1)
    assert metrics.flicker(one) == metrics.smoothness(one) == 1
    assert metrics.motion_energy(one, FPS) == 0
    assert set(metrics.drift(one, FPS).values()) == {0.0}


def test_a_known_seam():
    clip = plain(0, 4, 8, 12, 24, 28, 32)
    assert metrics.seam_ratio(clip, [4]) == 3
    assert metrics.seam_ratio(clip, [2]) == 1
    assert metrics.seam_ratio(clip, [2, 4]) == 3
    # The seam itself is no part of what it is compared with.
    assert metrics.seam_ratio(plain(0, 4, 16), [2]) == 3


def test_a_seam_among_frames_that_stand_still_has_a_floor_of_one_level():
    assert metrics.seam_ratio(plain(9, 9, 9, 10, 10), [3]) == 1
    assert metrics.seam_ratio(plain(9, 9, 9, 9, 9), [3]) == 0


@pytest.mark.parametrize("axis", [1, 2])
def test_a_seam_in_space(axis: int):
    ramp = np.array([0, 2, 4, 6, 18, 20, 22, 24], np.uint8)
    shape = [1, 1, 1, 1]
    shape[axis] = 8
    clip = np.broadcast_to(ramp.reshape(shape), (3, 8, 8, 3))
    assert metrics.seam_ratio(clip, [4], axis) == 6


@pytest.mark.parametrize("seams", [[], [0], [3]])
def test_a_seam_outside_of_the_clip_is_an_error(seams: list[int]):
    with pytest.raises(ValueError, match="within 1 to 2"):
        metrics.seam_ratio(plain(1, 2, 3), seams)


def test_a_loop_that_plays_on_and_one_that_jumps_back():
    assert metrics.loop_error(plain(0, 10, 20, 10)) == 1
    assert metrics.loop_error(plain(0, 10, 20, 30)) == 3


def test_fidelity_is_the_ratio_of_signal_to_noise():
    clip = plain(100, 100)
    assert metrics.fidelity(clip, clip) == 100
    assert metrics.fidelity(clip + np.uint8(5), clip) == pytest.approx(20 * np.log10(255 / 5))


@given(st.integers(0, 100))
def test_an_edit_of_colours_alone_keeps_the_structure(seed: int):
    source = noise(3, seed=seed) // 2
    assert metrics.edit_structure(source, source) == pytest.approx(1)
    assert metrics.edit_structure(source, 255 - source) == pytest.approx(1)
    assert metrics.edit_structure(source, source + np.uint8(100)) == pytest.approx(1)


def test_another_clip_has_another_structure():
    assert abs(metrics.edit_structure(noise(side=64), noise(side=64, seed=1))) < 0.05
    assert metrics.edit_structure(plain(1, 2), noise(2, 8)) == 0
