"""Where a container's times are wrong, frames come in their order at the container's rate, and the index says so."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clip_files import CODED_SIZE, code_of, coded, number_of, write_coded

from sora_train.data.decode.frames import DecodeRequest, decode_frames
from sora_train.data.decode.probe import Probe, ProbeRequest, probe_video, timing_of

RATE = 25
BASE = Fraction(1, RATE)
COUNTS = ("decode", "packets")


def probed(path: Path, count: str = "decode") -> Probe:
    return probe_video(
        ProbeRequest(0, path.name, str(path), 0, path.stat().st_size, "video", count)
    )


def all_frames(path: Path, found: Probe, first: int = 0) -> list[int]:
    """The numbers that a clip's frames bear, read at its rate from the frame `first` on."""
    times = tuple(index / found.fps for index in range(first, found.frames))
    shown = (found.height, found.width)
    frames = decode_frames(
        DecodeRequest(
            0, path.name, str(path), 0, path.stat().st_size, "video", times, (0, 0, *shown), shown,
            *CODED_SIZE, start=found.start, fps=found.fps, traits=found.traits,
        )
    )  # fmt: skip
    return [code_of(frame) for frame in frames]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("count", [*COUNTS, "header"])
def test_frames_of_an_avi_with_b_frames_are_those_of_its_control(
    tmp_path: Path, codec: str, count: str
):
    """AVI holds no presentation times; a Matroska of the same frames does."""
    for suffix in ("avi", "mkv"):
        path = write_coded(tmp_path / f"a.{suffix}", list(range(60)), BASE, codec=codec)
        found = probed(path, count)
        assert (found.frames, found.fps, found.vfr) == (60, RATE, False), suffix
        assert all_frames(path, found) == list(range(60)), suffix
        # Beyond what is sought, too.
        assert all_frames(path, found, 40) == list(range(40, 60)), suffix
        if codec == "libx264":
            assert found.traits == ("counted other_container" if suffix == "avi" else "")


@pytest.mark.parametrize("count", COUNTS)
def test_frames_before_zero(tmp_path: Path, count: str):
    """FFmpeg's demuxer hands frames of negative times on without any."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream = container.add_stream("libx264", rate=RATE, options={"bf": "2", "g": "12"})
        stream.height, stream.width = CODED_SIZE
        stream.pix_fmt = "yuv420p"
        for index, image in enumerate(coded(40)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = index - 15, BASE
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    found = probed(path, count)
    assert (found.frames, found.fps, found.traits) == (40, RATE, "counted")
    assert all_frames(path, found) == list(range(40))


@pytest.mark.parametrize("count", COUNTS)
def test_a_file_that_is_cut_keeps_its_rate(tmp_path: Path, count: str):
    """Wherever it is cut, no frame is shown twice, and the strays after a gap are left out."""
    whole = write_coded(tmp_path / "a.mkv", [40 * index for index in range(60)], Fraction(1, 1000))
    data, gaps = whole.read_bytes(), 0
    path = tmp_path / "cut.mkv"
    for share in np.linspace(0.55, 0.95, 9):
        path.write_bytes(data[: int(share * len(data))])
        found = probed(path, count)
        gaps += found.traits == "gaps"
        assert (found.fps, found.vfr) == (RATE, False), share
        assert all_frames(path, found) == list(range(found.frames)), share
    assert gaps, "some cut falls among frames that are stored out of their order"


def test_files_that_are_glued_together_come_one_after_the_other(tmp_path: Path):
    part = write_coded(tmp_path / "a.ts", list(range(30)), BASE).read_bytes()
    path = tmp_path / "glued.ts"
    path.write_bytes(part + part)
    for count in COUNTS:
        found = probed(path, count)
        assert (found.frames, found.fps) == (60, RATE) and "counted" in found.traits, count
        assert all_frames(path, found) == [*range(30), *range(30)], count


@pytest.mark.parametrize("name", ["a.h264", "a.mpg", "a.ts", "a.flv"])
def test_other_containers_show_each_frame_wherever_reading_begins(tmp_path: Path, name: str):
    """A stream without a container has no times, a program stream has other times after a seek."""
    codec = "mpeg2video" if name == "a.mpg" else "libx264"
    path = write_coded(tmp_path / name, list(range(70)), BASE, codec=codec)
    for count in COUNTS:
        found = probed(path, count)
        assert (found.frames, found.fps, found.vfr) == (70, RATE, False), count
        assert "other_container" in found.traits
        for first in (0, 30, 55):
            assert all_frames(path, found, first) == list(range(first, 70)), (count, first)


def test_a_gif_shows_each_of_its_frames(tmp_path: Path):
    """Its times are hundredths of a second: 8, 17, 25, ... at twelve frames a second."""
    from clip_files import numbered
    from PIL import Image

    frames = [Image.fromarray(image) for image in numbered(24, *CODED_SIZE)]
    shown = np.diff(np.round(np.arange(25) / 12 * 100)) * 10
    path = tmp_path / "a.mp4"
    frames[0].save(
        path, format="GIF", save_all=True, append_images=frames[1:], duration=shown.tolist()
    )
    found = probed(path)
    times = tuple(index / found.fps for index in range(24))
    size = {"height": CODED_SIZE[0], "width": CODED_SIZE[1]}
    seen = decode_frames(
        DecodeRequest(
            0, "a", str(path), 0, path.stat().st_size, "video", times, (0, 0, *CODED_SIZE),
            CODED_SIZE, start=found.start, fps=found.fps, traits=found.traits, **size,
        )
    )  # fmt: skip
    assert [number_of(frame) for frame in seen] == list(range(24))


# -- the rule ----------------------------------------------------------------------------------


def even(count: int, start: float = 0.0) -> list[float | None]:
    return [start + index / RATE for index in range(count)]


BROKEN = {
    "fall": [*even(30), *even(30)],
    "permuted": [time for pair in zip(even(60)[1::2], even(60)[::2], strict=True) for time in pair],
    "missing": [None] * 10 + even(50),
    "another clock": [*even(30), *even(30, start=5000.0)],
    "no times": [None] * 60,
    "all the same": [0.0] * 60,
}


@pytest.mark.parametrize("name", BROKEN)
def test_times_that_fall_jump_or_are_missing_give_way_to_the_rate(name: str):
    timing = timing_of(BROKEN[name], RATE, 0.0)
    assert (timing.frames, timing.fps, timing.vfr) == (60, RATE, False)
    assert (timing.start, timing.duration, timing.trait) == (0.0, 60 / RATE, "counted")


def test_a_rate_that_the_times_deny_is_not_believed():
    """Some containers give their clock's ticks as the rate."""
    assert timing_of(BROKEN["fall"], 90000.0, 0.0).fps == pytest.approx(RATE)
    assert timing_of(BROKEN["no times"], 0.0, 0.0).fps == 25.0
    ntsc = np.round(np.arange(300) * 1.001 / 30, 3)
    assert timing_of(ntsc.tolist(), 30.0, 0.0).fps == pytest.approx(30 / 1.001, rel=1e-4)
    assert timing_of(ntsc.tolist(), 30 / 1.001, 0.0).fps == 30 / 1.001


def test_a_hold_of_a_frame_keeps_its_time_and_the_rate():
    """A second without frames in a clip of four: what comes after is shown when it was filmed."""
    timing = timing_of([*even(50), *even(50, start=3.0)], RATE, 0.0)
    assert (timing.fps, timing.vfr, timing.trait) == (RATE, True, "gaps")
    assert timing.frames == 1 + round((3.0 + 49 / RATE) * RATE)


@pytest.mark.parametrize("jitter", [0.0, 0.0005])
def test_times_that_are_right_are_kept(jitter: float):
    noise = np.random.default_rng(0).uniform(-jitter, jitter, 60)
    timing = timing_of((np.array(even(60, start=1.4)) + noise).tolist(), RATE, 0.0)
    assert (timing.frames, timing.fps, timing.vfr, timing.trait) == (60, RATE, False, "")
    assert timing.start == pytest.approx(1.4, abs=1e-3)
    irregular = np.random.default_rng(1).choice([0.02, 0.05, 0.11, 0.25], 60).cumsum()
    varied = timing_of(irregular.tolist(), RATE, 0.0)
    assert (varied.vfr, varied.trait) == (True, "")
    assert varied.fps == pytest.approx(59 / (irregular[-1] - irregular[0]))
