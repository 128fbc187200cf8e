"""Clips after bug reports: which frames are read, in which order, at which rate."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sora_train.data.decode.frames import BadClip, DecodeRequest, decode_frames
from sora_train.data.decode.probe import Probe, ProbeRequest, probe_video

# Input, after, frames, rate, height and width, traits.
READ = {
    "20-timing/x264_b3_25fps.avi": ("torchcodec#683", 75, 25, (64, 96), "counted other_container"),
    "20-timing/x264_b3_25fps.mkv": ("torchcodec#683", 75, 25, (64, 96), ""),
    "20-timing/xvid_b2.avi": ("torchcodec#1363", 73, 25, (64, 96), "counted other_container"),
    "21-stream/bframes.avi": ("decord#162", 24, 12, (64, 96), "other_container"),
    "21-stream/h264_bf.avi": ("decord#162", 24, 12, (64, 96), "counted other_container"),
    "21-stream/negative.mkv": ("eta#246", 48, 12, (64, 96), "counted"),
    "21-stream/cut.mkv": ("eta#246", 29, 12, (128, 192), "gaps"),
    "21-stream/live.mkv": ("eta#246", 25, 12, (64, 96), "no_duration"),
    "21-stream/frag.mp4": ("eta#246", 25, 12, (64, 96), ""),
    "21-stream/editlist.mp4": ("eta#246", 32, 12, (64, 96), "hidden_frames"),
    "21-stream/cover_first.mp4": ("eta#246", 25, 12, (64, 96), "several_streams"),
    "21-stream/glued.avi": (
        "decord#162",
        24,
        12,
        (64, 96),
        "counted several_sizes other_container",
    ),
    "21-stream/midres.mkv": ("decord#162", 24, 12, (64, 96), "several_sizes"),
    "21-stream/gif_named.mp4": ("eta#246", 12, 11.957, (64, 96), "alpha other_container"),
    "21-stream/png_named.mp4": ("eta#246", 1, 25, (64, 96), "other_container no_duration"),
    "21-stream/ts_named.mp4": ("eta#246", 12, 12, (64, 96), "other_container"),
    "21-stream/one_frame.mp4": ("eta#246", 1, 12, (64, 96), ""),
    "21-stream/interlaced.mp4": ("eta#246", 24, 12, (64, 96), "interlaced"),
    "21-stream/odd.mp4": ("eta#246", 12, 12, (64, 96), ""),
    "21-stream/sar.mp4": ("eta#246", 12, 12, (96, 192), "non_square"),
}
# Of these one frame stands for all: only size and orientation are in question.
STILL = {
    "21-stream/rot90.mp4": ("eta#246", 14, 12, (96, 64), ""),
    "21-stream/rot180.mp4": ("eta#246", 14, 12, (64, 96), ""),
    "21-stream/scaled2x.mp4": ("eta#246", 14, 12, (64, 192), "non_square"),
}
REFUSED = {
    "audio_only.mp4": "no video stream",
    "cover_audio.m4v": "no video stream",
    "cut_faststart.mp4": "after 27 of 48 frames",
    "cut_plain.mp4": "Invalid data",
    "empty.mp4": "Invalid data",
    "html.mp4": "Invalid data",
}


def probed(path: Path) -> Probe:
    return probe_video(ProbeRequest(0, path.name, str(path), 0, path.stat().st_size, "video"))


def frames(path: Path, found: Probe) -> np.ndarray:
    """Every frame, asked for at the clip's own rate."""
    times = tuple(index / found.fps for index in range(found.frames))
    shown = (found.height, found.width)
    return decode_frames(
        DecodeRequest(
            0, path.name, str(path), 0, path.stat().st_size, "video", times, (0, 0, *shown), shown,
            *shown, start=found.start, fps=found.fps, traits=found.traits,
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", [*READ, *STILL])
def test_every_frame_once_at_the_rate_it_was_filmed(cases: Path, row: Callable, name: str):
    after, count, rate, size, traits = {**READ, **STILL}[name]
    found = probed(cases / name)
    clip = frames(cases / name, found)
    distinct = len({frame.tobytes() for frame in clip})
    row(name, after, f"{distinct} frames at {found.fps:.5g}", found.traits or "nothing")
    assert (found.frames, found.fps) == (count, pytest.approx(rate, abs=1e-3))
    assert (found.height, found.width) == size and found.traits == traits
    assert distinct == (1 if name in STILL else count)


def test_the_avi_holds_the_frames_of_its_control(cases: Path):
    """Each frame is nearest to the frame of its own number in the Matroska."""
    avi, control = (
        frames(path, probed(path)).astype(int)
        for path in (cases / "20-timing" / f"x264_b3_25fps.{suffix}" for suffix in ("avi", "mkv"))
    )
    apart = np.abs(avi[:, None] - control[None]).mean(axis=(2, 3, 4))
    assert (apart.argmin(axis=1) == np.arange(75)).all()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_clip_is_dropped_with_the_reason(cases: Path, row: Callable, name: str):
    with pytest.raises(BadClip) as caught:
        probed(cases / "21-stream" / name)
    row(f"21-stream/{name}", "eta#246", "dropped", caught.value.detail)
    assert REFUSED[name] in caught.value.detail and " at 0x" not in caught.value.detail
