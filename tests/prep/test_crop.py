"""Bars are cut off to within two pixels and logos where little is lost; dark, still and plain scenes stay whole."""

from pathlib import Path

import av
import numpy as np
import pytest

from benchmarks.footage import CAMERAS, Shot, footage, logo_box, picture_box, write_footage
from data_prep.media.crop import Crop, CropConfig, find_crop

HEIGHT, WIDTH = 180, 320
MOVING = tuple(camera for camera in CAMERAS if camera != "static")
DEFAULT = CropConfig()


@pytest.fixture
def shown(tmp_path: Path):
    """uint8 (8, H, W, 3): frames of a shot of two seconds, as its H.264 file has them."""

    def decoded(shot: Shot) -> np.ndarray:
        path = write_footage(footage([shot], fps=4), tmp_path / "shot.mp4", crf=23)
        with av.open(str(path)) as container:
            return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])

    return decoded


def edges(crop: Crop) -> np.ndarray:
    return np.array([crop.left, crop.top, crop.left + crop.width, crop.top + crop.height])


@pytest.mark.parametrize("bars", ["letterbox", "pillarbox"])
def test_bars_are_found_to_within_two_pixels(shown, bars: str):
    for seed in range(24):
        exposure = (1.0, 0.6, 0.3)[seed % 3]
        shot = Shot(800 + seed, 2.0, CAMERAS[seed % 9], bars=bars, exposure=exposure)
        crop = find_crop(shown(shot), DEFAULT)
        left, top, width, height = picture_box(shot, HEIGHT, WIDTH)
        off = np.abs(edges(crop) - [left, top, left + width, top + height])
        assert crop.reason == bars and off.max() <= 2, (shot, crop)
        assert crop.width % 2 == crop.height % 2 == 0


def test_what_has_no_bars_and_no_logo_stays_whole(shown):
    for seed in range(18):
        camera = CAMERAS[seed % 9]
        for shot in (
            Shot(850 + seed, 2.0, camera, exposure=(1.0, 0.3, 0.06, 0.03)[seed % 4]),
            Shot(850 + seed, 2.0, camera, is_still=True, overlay=True),
            Shot(850 + seed, 2.0, camera, text="A LINE OF TEXT"),
        ):
            assert find_crop(shown(shot), DEFAULT) == Crop(0, 0, WIDTH, HEIGHT, ""), shot
    assert find_crop(shown(Shot(1, 2.0, black=True)), DEFAULT) == Crop(0, 0, WIDTH, HEIGHT, "")


def test_a_picture_that_darkens_towards_its_edge_has_no_bar(shown):
    samples = shown(Shot(870, 2.0, "pan_left")).astype(np.float32)
    shade = np.clip((np.arange(HEIGHT) - 10) / 60, 0, 1)[None, :, None, None]
    assert find_crop((samples * shade).astype(np.uint8), DEFAULT).reason == ""


@pytest.mark.parametrize("colour", [(0, 0, 0), (200, 30, 60), (255, 255, 255)])
def test_bars_on_all_sides_may_have_any_colour(shown, colour: tuple[int, int, int]):
    samples = shown(Shot(871, 2.0, "zoom_in")).copy()
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[20:160, 40:280] = True
    samples[:, ~inside] = colour
    crop = find_crop(samples, DEFAULT)
    assert crop == Crop(40, 20, 240, 140, "letterbox pillarbox")
    # A strip of colour on one side may be a part of the scene, a black one is not.
    inside[:160, :] = True
    samples = shown(Shot(871, 2.0, "zoom_in")).copy()
    samples[:, ~inside] = colour
    assert find_crop(samples, DEFAULT).height == (160 if colour == (0, 0, 0) else HEIGHT)


def test_a_logo_over_a_picture_that_moves_is_cut_off_where_enough_is_left(shown):
    missed: list[Shot] = []
    for seed, camera in enumerate(MOVING * 2):
        bars = ("", "letterbox")[seed % 2]
        shot = Shot(900 + seed, 2.0, camera, overlay=True, bars=bars)
        samples = shown(shot)
        crop = find_crop(samples, DEFAULT)
        assert crop.reason in (bars, f"{bars} watermark".strip()), (shot, crop)
        if crop.reason == bars:
            missed.append(shot)
            continue
        left, top, right, bottom = edges(crop)
        x, y, width, height = logo_box(shot, HEIGHT, WIDTH)
        assert x >= right or x + width <= left or y >= bottom or y + height <= top
        _, _, inner_width, inner_height = picture_box(shot, HEIGHT, WIDTH)
        assert crop.width * crop.height >= 0.84 * inner_width * inner_height
        whole = find_crop(samples, CropConfig(min_area=0.97))
        assert whole.reason == bars == find_crop(samples, CropConfig(watermarks=False)).reason
        assert "letterbox" not in find_crop(samples, CropConfig(bars=False)).reason
    # A hand that only trembles moves smooth areas too little to tell a logo from them.
    assert len(missed) <= 2, missed


def test_a_logo_over_a_picture_that_stands_is_left(shown):
    for seed in range(6):
        assert find_crop(shown(Shot(930 + seed, 2.0, overlay=True)), DEFAULT).reason == ""


@pytest.mark.parametrize("size", [(2, 2), (5, 7), (33, 33)])
def test_small_and_odd_pictures_get_even_sizes(size: tuple[int, int]):
    draws = np.random.default_rng(1)
    crop = find_crop(draws.integers(0, 256, (8, *size, 3), np.uint8), DEFAULT)
    assert crop == Crop(0, 0, size[1] // 2 * 2, size[0] // 2 * 2, "")
