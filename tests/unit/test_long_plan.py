"""Which frames each window of a long video makes, and colours matched to those it was shown."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses

from sora_train.errors import UserError
from sora_train.sampling.long.colour import FADE, GAINS, joined, match
from sora_train.sampling.long.plan import plan_windows, window_length
from sora_train.sampling.long.video import LongRequest, anchor_rate, levels
from sora_train.sampling.pipeline import ClipShape

STEPS = st.sampled_from([1, 4, 8])


@given(
    step=STEPS,
    frames=st.integers(1, 3000),
    latents=st.integers(2, 24),
    history=st.integers(1, 120),
)
@settings(deadline=None, max_examples=300)
def test_every_frame_is_made_once_of_frames_that_are_there(step, frames, latents, history) -> None:
    length = window_length(frames, 1 + step * latents, step)
    assert (length - 1) % step == 0 and length <= 1 + step * latents
    windows = plan_windows(frames, length, history, step)
    made = [frame for window in windows for frame in range(window.fresh, window.end)]
    assert made == list(range(frames)), "each once, in order, to the asked count"
    assert windows[0].start == windows[0].fresh == 0
    for window in windows:
        assert window.start % step == 0, "latent frames of all windows end at the same frames"
        assert window.end <= window.start + length
    for window in windows[1:]:
        assert 1 <= window.history <= max(history, 1) and (window.history - 1) % step == 0
        assert window.history + step > min(history, length - step), "no frame less than fits"
        assert window.fresh + step <= window.start + length, "it has something to make"


def test_a_minute_of_the_preset() -> None:
    """33 frames a window of which 13 are shown: 20 new ones each, LongCat-Video's share of history or more."""
    windows = plan_windows(480, 33, 13, 4)
    assert (len(windows), windows[1].start, windows[1].fresh, windows[1].end) == (24, 20, 33, 53)
    longcat = plan_windows(93 + 80 * 10, 93, 13, 4)
    assert len(longcat) == 11 and {window.history for window in longcat[1:]} == {13}


def test_windows_need_more_than_one_latent_frame() -> None:
    with refuses(UserError, "480 frames", "have 1", "--frames 9"):
        plan_windows(480, 1, 13, 4)


@given(
    seconds=st.floats(0.2, 200),
    fps=st.sampled_from([6.0, 8.0, 24.0, 29.97]),
    anchor=st.sampled_from([0.0, 0.5, 1.0]),
    smooth=st.sampled_from([0.0, 30.0, 48.0]),
)
@settings(deadline=None, max_examples=100)
def test_the_passes_cover_each_other(seconds, fps, anchor, smooth) -> None:
    """The file has the asked length, and a coarser pass reaches to the end of a finer one."""
    request = LongRequest(seconds, ClipShape(33, 48, 48, fps), anchor, smooth_fps=smooth)
    found = levels(request, 13, 4, anchored=True)
    finest = found[-1]
    assert finest.frames == max(1, round(seconds * request.fps))
    assert finest.windows[-1].end == finest.frames
    base = found[-2] if smooth else finest
    assert base.frames == max(1, round(seconds * fps))
    if anchor and seconds * anchor >= 1:
        anchors, step = found[0], 1 / fps
        assert (anchors.frames - 1) / anchor >= (base.frames - 1) * step - 1e-6
        assert (anchors.frames - 2) / anchor < (base.frames - 1) * step + 1e-6, "not one too many"


def test_anchors_are_of_the_lowest_rate_that_was_trained() -> None:
    shape = ClipShape(33, 48, 48, 8.0)
    assert anchor_rate((0.5, 24.0), shape) == 0.5
    assert anchor_rate((8.0, 24.0), shape) == 0.0, "too near to the video's own rate"
    assert anchor_rate((), shape) == 0.0


# --- colour ---


def textured(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 180, (4, 12, 10, 3)).astype(np.uint8)


def test_a_known_shift_of_each_channel_is_undone() -> None:
    wanted = textured()
    gain, shift = np.array([0.95, 1.0, 1.06]), np.array([4.0, -7.0, 0.0])
    made = np.rint(wanted * gain + shift).astype(np.uint8)
    restored = match(made, wanted)(made)
    assert np.abs(restored.astype(int) - wanted).max() <= 1
    assert np.array_equal(match(wanted, wanted)(wanted), wanted)


def test_a_gain_beyond_drift_is_not_followed() -> None:
    wanted = textured()
    flat = np.rint(120 + 0.5 * (wanted.astype(float) - 120)).astype(np.uint8)
    assert match(flat, wanted).gain == pytest.approx([GAINS[1]] * 3)
    grey = np.full_like(wanted, 90)
    assert match(grey, wanted).gain.tolist() == [1, 1, 1], "nothing there to stretch"
    assert match(grey, wanted)(grey).mean() == pytest.approx(wanted.mean(), abs=1)


def test_what_is_left_at_the_border_fades() -> None:
    """A window that makes another texture than it was shown, of the same colours: at the border one part in five of the
    step is left, and after four frames the window is as it was made."""
    scene = textured()
    other = np.ascontiguousarray(scene[:, ::-1])
    shown = np.repeat(scene[:1], 5, axis=0)
    made = np.repeat(other[:1], 5 + 9, axis=0)
    fresh = joined(made, shown)
    assert fresh.shape == made[5:].shape
    rest = shown[-1].astype(float) - made[0]
    for number in range(9):
        left = max(0, FADE - number) / (FADE + 1)
        assert np.abs(fresh[number] - (made[0] + left * rest)).max() <= 0.51
    again = joined(np.concatenate([shown, other[:3]]), shown)
    assert np.array_equal(again, other[:3]), "nothing is left, so nothing is added"
