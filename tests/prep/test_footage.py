"""Footage shows what it says of itself: where shots change, how the camera goes, what stands over the picture."""

from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from benchmarks.footage import (
    CAMERAS,
    JOINS,
    Footage,
    Shot,
    camera_at,
    footage,
    logo_box,
    picture_box,
    write_footage,
)

SIZE = {"height": 72, "width": 128}


def frames_of(film: Footage) -> np.ndarray:
    return np.stack(list(film.frames())).astype(np.float32)


def test_a_cut_is_where_two_frames_differ_most():
    film = footage([Shot(seed, 0.5, camera=CAMERAS[seed]) for seed in range(9)], **SIZE)
    frames = frames_of(film)
    changes = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    cuts = {round(begin * 24) for begin, _, _ in film.transitions}
    assert set((np.argsort(changes)[-8:] + 1).tolist()) == cuts
    assert len(frames) == film.num_frames == 9 * 12


@pytest.mark.parametrize("join", JOINS)
def test_frames_between_two_shots_are_mixed_as_told_and_no_others_are(join: str):
    film = footage([Shot(1, 0.5, is_still=True), Shot(2, 0.5, is_still=True)], [join], **SIZE)
    frames = frames_of(film)
    [(begin, end, kind)] = film.transitions
    first, last = round(begin * 24), round(end * 24)
    assert kind == join and film.shots[0][1] == begin and film.shots[1][0] == end
    assert (frames[:first] == frames[0]).all() and (frames[last:] == frames[-1]).all()
    for mixed in frames[first:last]:
        assert np.abs(mixed - frames[0]).mean() > 1 and np.abs(mixed - frames[-1]).mean() > 1
    assert (last > first) == (join != "cut")
    if join == "fade":
        assert frames[(first + last) // 2].max() == 0


def test_a_panned_picture_is_the_one_before_moved_by_what_the_camera_went():
    shot = Shot(3, 1.0, camera="pan_right")
    frames = frames_of(footage([shot], height=72, width=640))
    moved = (camera_at(shot, 5 / 24)[0] - camera_at(shot, 0)[0]) * 640
    errors = [
        np.abs(frames[5][:, 60:500] - frames[0][:, 60 + by : 500 + by]).mean() for by in range(60)
    ]
    assert abs(int(np.argmin(errors)) - moved) <= 1


def test_what_is_still_and_what_stands_over_the_picture_does_not_move():
    shot = Shot(4, 0.5, camera="pan_left", overlay=True, bars="letterbox")
    frames = frames_of(footage([shot], **SIZE))
    left, top, width, height = logo_box(shot, 72, 128)
    middle = frames[:, top + 2 : top + height - 2, left + 2 : left + width - 2]
    assert middle.std(0).max() < 1 < frames.std(0).mean()
    left, top, width, height = picture_box(shot, 72, 128)
    assert frames[:, :top].max() == 0 and frames[:, top + height :].max() == 0
    assert frames[:, top : top + height].mean((0, 2, 3)).min() > 5
    still = frames_of(footage([Shot(4, 0.5, camera="pan_left", is_still=True)], **SIZE))
    assert (still == still[0]).all()


def test_footage_is_written_with_its_times_and_the_same_twice(tmp_path: Path):
    film = footage([Shot(5, 0.5), Shot(6, 0.5, black=True)], fps=30000 / 1001, **SIZE)
    first = write_footage(film, tmp_path / "a.mp4").read_bytes()
    assert first == write_footage(film, tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
        assert container.streams.video[0].codec_context.colorspace == 1
    assert len(times) == film.num_frames
    assert all(abs(b - a - 1001 / 30000) < 1e-3 for a, b in pairwise(times))
