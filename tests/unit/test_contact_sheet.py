"""The contact sheet shows the clips' own pixels, each row in order of time."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from sora_train.base import contact_sheet as module
from sora_train.base.contact_sheet import LABEL_WIDTH, MARGIN, contact_sheet


def coloured(colours: list[tuple[int, int, int]], size: int = 32) -> np.ndarray:
    return np.stack([np.full((size, size, 3), colour, np.uint8) for colour in colours])


def test_frames_run_left_to_right_from_first_to_last(tmp_path: Path):
    colours = [(20 * t, 255 - 20 * t, 7) for t in range(9)]
    path = contact_sheet([coloured(colours)], ["a prompt"], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(path))
    row = sheet[MARGIN + 5, MARGIN + LABEL_WIDTH :]
    seen = list(dict.fromkeys(tuple(map(int, p)) for p in row if tuple(p) != module.BACKGROUND))
    assert seen == [colours[t] for t in (0, 2, 4, 6, 8)]


def test_small_clips_grow_by_a_whole_factor_without_smoothing(tmp_path: Path):
    clip = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3), dtype=np.uint8)
    sheet = np.asarray(Image.open(contact_sheet([clip], ["x"], tmp_path / "sheet.png")))
    left, top, factor = MARGIN + LABEL_WIDTH, MARGIN, 8
    shown = sheet[top : top + 16 * factor, left : left + 24 * factor]
    np.testing.assert_array_equal(shown, clip[0].repeat(factor, 0).repeat(factor, 1))


def test_clips_of_all_sizes_fit_on_one_sheet(tmp_path: Path):
    sizes = [(1, 48, 32), (17, 24, 40), (5, 480, 832), (2, 1, 1), (3, 8, 900)]
    clips = [np.zeros((*size, 3), np.uint8) for size in sizes]
    path = contact_sheet(clips, ["a long prompt " * 12] * 5, tmp_path / "deep/er/sheet.png")
    sheet = Image.open(path)
    assert sheet.width < 2 * MARGIN + LABEL_WIDTH + 5 * (module.MAX_FRAME[0] + module.GAP)
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"], "nothing half-written"


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=120), st.integers(60, 400))
def test_wrapping_loses_no_letter_and_keeps_the_width(text: str, width: int):
    font = ImageFont.load_default(size=12)
    lines = module._wrap(text, font, width)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(font.getlength(line) <= width or len(line) == 1 for line in lines)


@pytest.mark.parametrize(
    "clip", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8)]
)
def test_other_arrays_are_refused(clip: np.ndarray, tmp_path: Path):
    with pytest.raises(ValueError, match="uint8"):
        contact_sheet([clip], ["x"], tmp_path / "sheet.png")


def test_labels_must_match(tmp_path: Path):
    with pytest.raises(ValueError, match="as many labels"):
        contact_sheet([coloured([(0, 0, 0)])], [], tmp_path / "sheet.png")
