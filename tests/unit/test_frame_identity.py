"""Every decoder gives the frames that are shown at the planned times: frames bear their numbers."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clip_files import CODED_SIZE, code_of, inflate, skip_ticks, turn, write_coded
from sentences import refuses

from sora_train.data.decode import frames as decode
from sora_train.data.decode import torchcodec as decode_torchcodec
from sora_train.data.decode.frames import DecodeRequest
from sora_train.data.decode.pool import DecodePool, worker_of
from sora_train.data.decode.probe import Probe, ProbeRequest, probe_video
from sora_train.data.sample import Bucket, Failure
from sora_train.data.transforms import sampled_frames, window
from sora_train.errors import Fault, UserError

NTSC, MILLI = Fraction(1001, 24000), Fraction(1, 1000)
COUNT = 84
IRREGULAR = np.random.default_rng(1).choice([20, 33, 50, 117, 250], COUNT).cumsum().tolist()
# Ticks of an mp4 are what its muxer makes of them; at 1/12800 each frame of 25 fps has 512.
MP4_TICKS = 512


@dataclass(frozen=True)
class Coded:
    """How a clip is made, the numbers of the frames that are shown, and from when each is."""

    make: Callable[[Path], Path]
    seconds: list[float]
    first: int = 0
    suffix: str = "mp4"
    encoder: str = "libx264"


def plain(ticks: list[int], base: Fraction, suffix: str = "mp4", **options: object) -> Coded:
    begin = ticks[0]
    return Coded(
        lambda path: write_coded(path, ticks, base, **options),
        [float((tick - begin) * base) for tick in ticks],
        suffix=suffix,
        encoder=str(options.get("codec", "libx264")),
    )


EVEN = list(range(COUNT))
CLIPS = {
    "30fps_b_frames": plain(EVEN, Fraction(1, 30)),
    "23.976fps": plain(EVEN, NTSC),
    "one_key_frame": plain(EVEN, Fraction(1, 30), options={"g": "999", "bf": "3"}),
    "open_gop": plain(
        EVEN, Fraction(1, 30), options={"g": "12", "bf": "3", "x264-params": "open-gop=1"}
    ),
    "irregular": plain(IRREGULAR, MILLI),
    "irregular_mkv": plain(IRREGULAR, MILLI, "mkv"),
    "starts_late": plain([tick + 45 for tick in EVEN], Fraction(1, 30)),
    "starts_late_mkv": plain([40 * tick + 700 for tick in EVEN], MILLI, "mkv"),
    "edit_list": Coded(
        lambda path: skip_ticks(write_coded(path, EVEN, Fraction(1, 25)), 7 * MP4_TICKS),
        [index / 25 for index in range(COUNT - 7)],
        first=7,
    ),
    "turned": Coded(
        lambda path: turn(write_coded(path, EVEN, Fraction(1, 30), turned=1)),
        [index / 30 for index in EVEN],
    ),
    "webm_vp9": plain(
        [40 * tick for tick in EVEN], MILLI, "webm", codec="libvpx-vp9",
        options={"deadline": "realtime", "cpu-used": "8", "g": "20"},
    ),
    "mp4_av1": plain(EVEN, Fraction(1, 30), codec="libsvtav1", options={"preset": "13", "g": "20"}),
}  # fmt: skip
REFUSED = {("decord", "mp4_av1"): "unreadable", ("decord", "edit_list"): "hides its first frames"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("coded")

    def get(name: str) -> Path:
        path = folder / f"{name}.{CLIPS[name].suffix}"
        return path if path.exists() else CLIPS[name].make(path)

    return get


@pytest.fixture(scope="module", params=["pyav", "decord", "torchcodec"])
def pool(request: pytest.FixtureRequest) -> Iterator[tuple[str, DecodePool]]:
    backend = request.param
    if backend != "pyav" and importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    with DecodePool(1, timeout=120, module=worker_of(backend)) as made:
        yield backend, made


def probed(path: Path, count: str = "decode") -> Probe:
    return probe_video(
        ProbeRequest(0, path.name, str(path), 0, path.stat().st_size, "video", count)
    )


def asked(path: Path, found: Probe, times: tuple[float, ...], backend: str) -> DecodeRequest:
    shown = (found.height, found.width)
    return DecodeRequest(
        0,
        path.name,
        str(path),
        0,
        path.stat().st_size,
        "video",
        times,
        (0, 0, *shown),
        shown,
        *CODED_SIZE,
        start=found.start,
        fps=found.fps,
        backend=backend,
    )


def windows(found: Probe) -> list[tuple[float, ...]]:
    """What training might ask for: the start, the middle, the end, at the clip's own rate and slower."""
    made = []
    for frames, fps, u in ((9, 60.0, 0.0), (13, 60.0, 0.55), (5, 8.0, 0.8), (9, 60.0, 1 - 2**-53)):
        made.append(window(found.frames, found.fps, Bucket(frames, 64, 128), fps, u)[0])
    return made


@pytest.mark.parametrize("name", CLIPS)
def test_the_frames_are_those_shown_at_the_times(
    pool: tuple[str, DecodePool], clips: Callable[[str], Path], name: str
):
    backend, processes = pool
    clip, path = CLIPS[name], clips(name)
    found = probed(path)
    assert (found.frames, found.height, found.width) == (len(clip.seconds), *CODED_SIZE)
    assert found.rotation == (270 if name == "turned" else 0)
    for times in windows(found):
        frames = processes.submit(asked(path, found, times, backend)).result(timeout=120)
        if refusal := REFUSED.get((backend, name)):
            assert isinstance(frames, Failure) and refusal in f"{frames.reason}: {frames.detail}"
            continue
        assert not isinstance(frames, Failure), frames
        shown = np.searchsorted(np.asarray(clip.seconds) - 1e-3, times, side="right") - 1
        assert [code_of(frame) for frame in frames] == (clip.first + shown).tolist(), times


@pytest.mark.parametrize("count", ["packets", "header"])
@pytest.mark.parametrize("name", CLIPS)
def test_a_cheaper_probe_plans_no_frame_that_is_not_there(
    clips: Callable[[str], Path], name: str, count: str
):
    path = clips(name)
    found, decoded = probed(path, count), probed(path)
    assert found.start == pytest.approx(decoded.start, abs=1e-3)
    if count == "packets":
        assert (found.frames, found.fps, found.vfr) == (decoded.frames, decoded.fps, decoded.vfr)
    last = decode.decode_frames(asked(path, found, windows(found)[-1], "pyav"))
    assert code_of(last[-1]) >= COUNT - 2, "its last window ends with the last frames"


@pytest.mark.parametrize("target", [2.0, 8.0, 60.0])
@pytest.mark.parametrize("name", ["irregular", "irregular_mkv"])
def test_the_rate_of_a_variable_clip_is_that_of_its_sampled_frames(
    clips: Callable[[str], Path], name: str, target: float
):
    """Moments lie evenly, 1 / fps apart, over the clip's whole length: its time runs as it was filmed."""
    clip, found = CLIPS[name], probed(clips(name))
    last = clip.seconds[-1]
    assert found.vfr and found.fps == pytest.approx((COUNT - 1) / last, rel=1e-3)
    (most,) = sampled_frames(np.array([found.frames]), np.array([found.fps]), target)
    for u in (0.0, 0.5, 1 - 2**-53):
        times, fps = window(found.frames, found.fps, Bucket(int(most), 64, 128), target, u)
        assert fps == min(target, found.fps)
        assert np.diff(times) == pytest.approx(1 / fps)
        assert times[-1] <= last + 0.01 and last - times[-1] + times[0] < 1 / fps + 0.01


def test_every_decoder_tells_whose_fault_it_is(
    pool: tuple[str, DecodePool], clips: Callable[[str], Path], tmp_path: Path
):
    """A clip that is shorter than planned, cut, empty or turned to noise is bad; one that storage cuts short is not."""
    backend, processes = pool
    whole = clips("30fps_b_frames")
    found, data = probed(whole), whole.read_bytes()

    def answer(data: bytes, times: tuple[float, ...], **change: object) -> object:
        path = tmp_path / "clip.mp4"
        path.write_bytes(data)
        wanted = replace(asked(path, found, times, backend), **change)
        return processes.submit(wanted).result(timeout=120)

    middle = windows(found)[1]
    assert [code_of(frame) for frame in answer(data, middle)][0] == round(middle[0] * 30)
    for bad, times, reason in (
        (inflate(data), (0.0, 5.0), "too_few_frames"),
        (data, (0.0, 5.0), "too_few_frames"),
        (data[: len(data) // 2], windows(found)[-1], "unreadable"),
        (b"", middle, "unreadable"),
        (data[:40] + bytes(len(data) - 40), middle, "unreadable"),
    ):
        failure = answer(bad, times)
        assert isinstance(failure, Failure) and failure.detail, (reason, len(bad))
        # A header that promises too much may be found out by the time or by the bytes that are not there.
        assert failure.reason in {reason, "unreadable"}
    with refuses(Fault, "index", "storage"):
        answer(data, middle, length=len(data) + 9999)


def test_torch_is_loaded_by_torchcodecs_process_alone(
    pool: tuple[str, DecodePool], clips: Callable[[str], Path]
):
    backend, processes = pool
    path = clips("30fps_b_frames")
    found = probed(path)
    processes.submit(asked(path, found, (0.0,), backend)).result(timeout=120)
    (pid,) = processes.pids
    loaded = Path(f"/proc/{pid}/maps").read_text()
    assert ("libtorch" in loaded) == (backend == "torchcodec")
    assert "libav" in loaded


def test_a_decoder_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refuses(UserError, "torchcodec", "sora_train[torchcodec]"):
        decode_torchcodec.require()
