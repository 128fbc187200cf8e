"""What stays: black, frozen and doubled frames are counted whatever the codec adds, overlays where the rest moves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.footage import CAMERAS, Shot, footage, logo_box
from data_prep.scores.overlay import overlaid
from data_prep.scores.stillness import dips
from sora_train.data.decode.video_io import encode_h264
from tests.prep.scored import filmed, only, played, scored

STILLNESS = only("stillness")


def frames(seconds: float = 2.0, seed: int = 3, camera: str = "pan_left") -> np.ndarray:
    return np.stack(list(footage([Shot(seed, seconds, camera)]).frames()))


def test_moving_footage_has_nothing_black_frozen_or_doubled(tmp_path):
    found = played(tmp_path / "a.mp4", frames(), STILLNESS)
    assert (found["black"], found["duplicate_frames"]) == (0, 0)
    assert found["frozen"] < 0.05


@pytest.mark.parametrize("crf", [18, 28])
def test_a_still_picture_is_frozen_and_its_frames_are_duplicates(crf, tmp_path):
    shot = Shot(seed=5, seconds=2, is_still=True)
    found = filmed(tmp_path / "a.mp4", shot, STILLNESS, crf=crf)
    assert found["frozen"] == pytest.approx(1, abs=1e-3) and found["duplicate_frames"] == 1


def test_frozen_is_the_share_of_the_longest_stretch(tmp_path):
    moving = frames()
    stopped = np.concatenate([moving[:12], np.repeat(moving[12:13], 24, 0), moving[13:25]])
    found = played(tmp_path / "a.mp4", stopped, STILLNESS)
    assert found["frozen"] == pytest.approx(24 / 48, abs=0.03)
    assert found["duplicate_frames"] == pytest.approx(23 / 47, abs=0.03)


def test_something_small_that_moves_is_not_frozen(tmp_path):
    still = np.repeat(frames(1 / 24), 48, 0).copy()
    for number, frame in enumerate(still):
        frame[80:92, 40 + 3 * number : 52 + 3 * number] = 250
    found = played(tmp_path / "a.mp4", still, STILLNESS)
    assert found["frozen"] < 0.1


@pytest.mark.parametrize(
    ("pattern", "share"), [((0, 0), 1 / 2), ((0, 1, 2, 3, 3), 1 / 5), ((0, 0, 0), 2 / 3)]
)
@pytest.mark.parametrize("crf", [18, 28])
def test_doubled_frames_are_counted_through_the_codec(pattern, share, crf, tmp_path):
    moving, step = frames(), max(pattern) + 1
    doubled = [moving[n + k] for n in range(0, len(moving) - step, step) for k in pattern]
    encode_h264(np.stack(doubled), 30.0, tmp_path / "a.mp4", crf)
    assert scored(tmp_path / "a.mp4", STILLNESS)["duplicate_frames"] == pytest.approx(
        share, abs=0.04
    )


def test_black_is_the_share_of_the_time(tmp_path):
    dark = frames()
    dark[:12] = 0
    dark[12:24] = 70
    assert played(tmp_path / "a.mp4", dark, STILLNESS)["black"] == pytest.approx(0.25, abs=0.01)


@given(st.lists(st.floats(0, 60), min_size=1, max_size=40))
def test_dips_lie_between_larger_changes(changes):
    found = dips(np.array(changes))
    for n in np.flatnonzero(found):
        assert changes[n] <= 4 and changes[n] <= max(changes) / 4
    assert not dips(np.array(changes) * 0 + 1.0).any()


def test_a_logo_counts_where_the_picture_moves_behind_it(tmp_path):
    shot = Shot(seed=8, seconds=3, camera="pan_right", overlay=True)
    found = filmed(tmp_path / "a.mp4", shot, only("overlay"))
    *_, width, height = logo_box(shot, 180, 320)
    disc = np.pi / 4 * width * height / (180 * 320)
    assert 0.8 * disc < found["overlay_area"] < 2 * disc
    bare = filmed(tmp_path / "b.mp4", Shot(8, 3, "pan_right"), only("overlay"))
    assert bare["overlay_area"] == 0


@pytest.mark.parametrize("still", [True, False])
def test_without_a_moving_background_overlays_are_unknown(still, tmp_path):
    shot = Shot(seed=1, seconds=2, overlay=True, is_still=still)
    assert filmed(tmp_path / "a.mp4", shot, only("overlay"))["overlay_area"] is None


def test_an_overlay_has_edges_that_stay_and_surroundings_that_move():
    deviation = np.full((60, 80), 30.0)
    stays = np.zeros((60, 80), bool)
    deviation[20:30, 20:40] = 1
    assert not overlaid(stays, deviation).any(), (
        "a flat place, such as a sky, has no edge that stays"
    )
    stays[20:30, [20, 39]] = stays[[20, 29], 20:40] = True
    assert overlaid(stays, deviation).sum() == 10 * 20
    assert not overlaid(stays, np.where(deviation > 1, 4.0, 1.0)).any(), "all stands still"


def is_seen_to_stand(frames: np.ndarray) -> bool:
    """Whether most frames show the first one: a standing camera may look at where nothing moves."""
    differs = np.abs(frames.astype(np.int16) - frames[0]).max(axis=3) > 8
    return bool((differs.mean(axis=(1, 2)) < 1e-3).mean() > 0.5)


@pytest.mark.slow
def test_still_and_moving_footage_are_told_apart(tmp_path):
    wrong, count = [], 0
    for seed in range(40):
        for is_still in (True, False):
            camera = "static" if seed % 2 else CAMERAS[seed % len(CAMERAS)]
            shot = Shot(3000 + seed, 2 + seed % 3, camera, is_still=is_still)
            filmed = np.stack(list(footage([shot]).frames()))
            encode_h264(filmed, 24.0, tmp_path / "a.mp4", (18, 23, 28, 32)[seed % 4])
            found = scored(tmp_path / "a.mp4", STILLNESS)
            count += 1
            if (found["frozen"] > 0.5) != is_seen_to_stand(filmed):
                wrong.append((seed, is_still, found["frozen"]))
    print(f"still: {count - len(wrong)} of {count} right; {wrong}")
    assert len(wrong) <= 0.03 * count
