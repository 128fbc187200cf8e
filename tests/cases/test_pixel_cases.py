"""Pictures and clips after bug reports: what is read of each is what a player shows."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sora_train.data.decode.frames import BadClip, DecodeRequest, decode_frames
from sora_train.data.decode.probe import Probe, ProbeRequest, probe_video

PICTURES = (".png", ".jpg", ".webp")
RAMP = np.arange(16, 256, 32)
BLACK, GREEN = (0, 0, 0), (20, 160, 20)
BARS = [
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 60),
    (30, 30, 30), (235, 235, 235), (128, 128, 128), (0, 0, 0),
]  # fmt: skip
CUTOUT = [BLACK, BLACK, GREEN, GREEN, GREEN, BLACK, BLACK, BLACK]
GREY = [(value,) * 3 for value in RAMP]
MIXED = [(value, 60, 255 - value) for value in RAMP]
ONE_BIT = [(0, 0, 0)] * 4 + [(255, 255, 255)] * 4
WHITE_AT_203 = [*BARS[:-1], (255, 255, 255)]

# Input, after, colours of the eight bars, largest error, traits.
LOOKS: dict[str, tuple[str, list, int, str]] = {
    "05-mpo/phone.jpg": ("synapse#20024", GREY, 2, "first_of_several"),
    "06-alpha/cutout.png": ("sd-scripts#1269", CUTOUT, 1, "alpha"),
    "06-alpha/cutout2.webp": ("sd-scripts#1269", CUTOUT, 1, "alpha"),
    "06-alpha/palette.png": ("mflux#722", CUTOUT, 1, "alpha"),
    "07-16bit/gray16.png": ("Pillow#2574", GREY, 1, ""),
    "07-16bit/rgb16.png": ("Pillow#2574", GREY, 1, ""),
    "07-modes/base.png": ("Pillow#2574", MIXED, 1, ""),
    "07-modes/cmyk.jpg": ("Pillow#2574", MIXED, 3, ""),
    "07-modes/exifjunk.jpg": ("Pillow#2574", MIXED, 4, ""),
    "07-modes/exifzero.jpg": ("Pillow#2574", MIXED, 4, ""),
    "07-modes/gray16b.png": ("Pillow#2574", GREY, 1, ""),
    "07-modes/l.png": ("Pillow#2574", GREY, 1, ""),
    "07-modes/la.png": ("Pillow#2574", GREY, 1, ""),
    "07-modes/one.png": ("Pillow#2574", ONE_BIT, 0, ""),
    "07-modes/rgba64.png": ("Pillow#2574", GREY, 1, ""),
    "07-modes/ya16.png": ("Pillow#2574", GREY, 1, ""),
    "25-video-alpha/png.mov": ("sd-scripts#1269", CUTOUT, 1, "alpha"),
    "25-video-alpha/prores4444.mov": ("sd-scripts#1269", CUTOUT, 2, "alpha"),
    "25-video-alpha/qtrle.mov": ("sd-scripts#1269", CUTOUT, 1, "alpha"),
    "25-video-alpha/vp8alpha.webm": ("sd-scripts#1269", CUTOUT, 3, "alpha"),
    "25-video-alpha/vp9alpha.webm": ("sd-scripts#1269", CUTOUT, 3, "alpha"),
    # Ten bits of PQ tell no more of the darkest channel of a pure colour.
    "26-hdr/pq_real.mp4": ("video-use#6", WHITE_AT_203, 13, "pq"),
    **{
        f"08-colour/{name}": ("PyAV#2149", BARS, 3, traits)
        for name, traits in (
            *((f"{name}.mp4", "") for name in (
                "2020tv10", "470bg", "601pc", "601tv", "709pc", "709pc420", "709tv", "709tv420", "gbr",
                "untagged",
            )),
            ("untagged_hd.mp4", "untagged_hd"),
            ("mjpeg.avi", "other_container"),
            ("rgba.mov", "alpha"),
            ("vp9_709.webm", ""),
        )
    },
}  # fmt: skip


def probed(path: Path) -> Probe:
    kind = "image" if path.suffix in PICTURES else "video"
    return probe_video(ProbeRequest(0, path.name, str(path), 0, path.stat().st_size, kind))


def first_frame(path: Path, found: Probe, side: int = 0) -> np.ndarray:
    """At its own size, or as a square of so many pixels."""
    kind = "image" if path.suffix in PICTURES else "video"
    shown = (found.height, found.width)
    request = DecodeRequest(
        0, path.name, str(path), 0, path.stat().st_size, kind, (0.0,), (0, 0, *shown), shown,
        *((side, side) if side else shown), start=found.start, fps=found.fps, traits=found.traits,
    )  # fmt: skip
    return decode_frames(request)[0]


@pytest.mark.parametrize("name", LOOKS)
def test_the_bars_are_those_that_were_drawn(cases: Path, row: Callable, name: str):
    after, bars, most, traits = LOOKS[name]
    found = probed(cases / name)
    frame = first_frame(cases / name, found)
    height, width = frame.shape[:2]
    seen = frame[height // 2, width // 16 :: width // 8].astype(int)
    error = int(np.abs(seen - bars).max())
    row(name, after, f"{len(bars)} colours within {error}", found.traits or "nothing")
    assert found.traits == traits
    assert error <= most, seen.tolist()


@pytest.mark.parametrize("name", ["exif6.jpg", "exif6.png", "exif6.webp", "exifbad.jpg"])
def test_exif_turns_the_picture(cases: Path, row: Callable, name: str):
    """Orientation 6: stored lying, shown standing; the ramp runs down."""
    found = probed(cases / "07-modes" / name)
    seen = first_frame(cases / "07-modes" / name, found)
    row(f"07-modes/{name}", "Pillow#2574", f"{found.width}x{found.height}, upright", "nothing")
    assert seen.shape == (192, 128, 3)
    assert np.abs(seen[12::24, 64].astype(int) - MIXED).max() <= 6


@pytest.mark.parametrize(("name", "side", "colour"), [
    ("18-large.png", 10000, (90, 30, 200)), ("18-huge.png", 14000, (90, 90, 90)),
])  # fmt: skip
def test_pictures_of_hundreds_of_millions_of_pixels(
    cases: Path, row: Callable, name: str, side: int, colour: tuple[int, int, int]
):
    found = probed(cases / name)
    seen = first_frame(cases / name, found, 64)
    row(name, "MONAILabel#1230", f"{found.width}x{found.height}", "nothing")
    assert (found.width, found.height) == (side, side)
    assert np.abs(seen.astype(int) - colour).max() <= 1


@pytest.mark.parametrize("name", ["pq", "hlg"])
def test_hdr_is_told(cases: Path, row: Callable, name: str):
    found = probed(cases / "26-hdr" / f"{name}.mp4")
    row(f"26-hdr/{name}.mp4", "video-use#6", f"{found.frames} frames, tone-mapped", found.traits)
    assert found.traits == name
    frame = first_frame(cases / "26-hdr" / f"{name}.mp4", found)
    assert len(np.unique(frame.reshape(-1, 3), axis=0)) > 8, "no flat white"


def test_a_video_under_a_pictures_name_is_no_picture(cases: Path, row: Callable):
    with pytest.raises(BadClip) as caught:
        probed(cases / "21-stream" / "video_named.png")
    row("21-stream/video_named.png", "decord#162", "dropped", caught.value.detail)
    assert "picture" in caught.value.detail and "0x" not in caught.value.detail
