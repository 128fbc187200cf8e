"""Decoding: the right frames, at the right size, from processes that may spin, abort or die."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from clip_files import number_of, numbered, real_clips, write_clip, write_timed
from PIL import Image
from sentences import refuses

from sora_train.data.decode import frames as decode
from sora_train.data.decode import pipe
from sora_train.data.decode.frames import BadClip, DecodeRequest
from sora_train.data.decode.pool import DecodePool
from sora_train.data.decode.probe import Probe, ProbeRequest, probe_video
from sora_train.data.decode.video_io import encode_h264
from sora_train.data.decode.worker import TEST_HOOK
from sora_train.data.sample import Failure
from sora_train.data.storage.ranges import StorageFault
from sora_train.errors import Fault, UserError


def probe(path: Path, count: str = "decode") -> Probe:
    kind = "image" if path.suffix == ".png" else "video"
    return probe_video(ProbeRequest(0, path.name, str(path), 0, path.stat().st_size, kind, count))


def request(path: Path, times: tuple[float, ...], **change: object) -> DecodeRequest:
    size = (32, 48)
    values: dict = {
        "row": 7, "key": path.name, "path": str(path), "offset": 0, "length": path.stat().st_size,
        "kind": "video", "times": times, "crop": (0, 0, *size), "shown": size,
        "height": size[0], "width": size[1], "fps": 8.0, **change,
    }  # fmt: skip
    return DecodeRequest(**values)


def real(name: str, times: tuple[float, ...], **change: object) -> DecodeRequest:
    path = real_clips() / name
    found = probe(path)
    shown = (found.height, found.width)
    known = {"shown": shown, "crop": (0, 0, *shown), "height": shown[0], "width": shown[1]}
    return request(
        path,
        times,
        start=found.start,
        fps=found.fps,
        **{**known, **change},
    )


def test_probe_says_what_is_in_the_file(tmp_path: Path):
    found = probe(write_clip(tmp_path / "a.mp4", count=9, fps=8))
    assert (found.frames, found.fps, found.vfr, found.height, found.width) == (
        9,
        8.0,
        False,
        32,
        48,
    )
    assert (
        found.duration == pytest.approx(9 / 8) and found.codec == "h264" and len(found.digest) == 32
    )
    assert probe(tmp_path / "a.mp4", "packets").frames == 9
    Image.fromarray(numbered(1)[0]).save(tmp_path / "b.png")
    found = probe(tmp_path / "b.png")
    assert (found.frames, found.fps, found.height, found.width, found.codec) == (
        1,
        0.0,
        32,
        48,
        "png",
    )


def test_exif_rotation_of_images(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(numbered(1)[0]).save(tmp_path / "b.png", exif=exif)
    assert (probe(tmp_path / "b.png").height, probe(tmp_path / "b.png").width) == (48, 32)


@pytest.mark.parametrize("seek_worth", [0.0, 1e9])
def test_frames_are_those_shown_at_the_times(tmp_path: Path, monkeypatch, seek_worth: float):
    monkeypatch.setattr(decode, "SEEK_WORTH_SECONDS", seek_worth)
    path = write_clip(tmp_path / "a.mp4", count=36, fps=8)
    for first in (0, 1, 13, 30):
        times = tuple(
            (first + step) / 8 + shift
            for step, shift in enumerate((0, 0.0004, 0.06, -0.0004, 0.12))
        )
        clip = decode.decode_frames(request(path, times))
        assert [number_of(frame) for frame in clip] == [
            first,
            first + 1,
            first + 2,
            first + 3,
            first + 4,
        ]


@pytest.mark.parametrize("seek_worth", [0.0, 1e9])
def test_variable_rate_goes_by_time(tmp_path: Path, monkeypatch, seek_worth: float):
    monkeypatch.setattr(decode, "SEEK_WORTH_SECONDS", seek_worth)
    shown_at = [
        500,
        540,
        580,
        900,
        940,
        980,
        1020,
        1700,
        1740,
        1780,
        1820,
        1860,
        2500,
        2540,
        2580,
        2620,
    ]
    path = write_timed(tmp_path / "v.mkv", shown_at)
    found = probe(path)
    assert found.vfr and found.frames == len(shown_at)
    assert found.start == pytest.approx(0.5)
    times = tuple(np.arange(0.1, 2.1, 0.17))
    clip = decode.decode_frames(request(path, times, start=found.start, fps=found.fps))
    expected = [
        np.searchsorted(np.array(shown_at) - 500, t * 1000 + 1, side="right") - 1 for t in times
    ]
    assert [number_of(frame) for frame in clip] == expected


def test_a_file_that_became_shorter_is_not_padded(tmp_path: Path):
    path = write_clip(tmp_path / "a.mp4", count=9)
    with refuses(BadClip, "too_few_frames", "1.000 s", "2.000 s"):
        decode.decode_frames(request(path, (0.0, 2.0)))


def test_crop_and_resize_are_of_the_displayed_frame(tmp_path: Path):
    frames = np.zeros((2, 64, 96, 3), np.uint8)
    frames[:, :, 48:] = 240
    encode_h264(frames, 8, tmp_path / "half.mp4")
    cut = {"shown": (64, 96), "height": 16, "width": 16}
    left = decode.decode_frames(request(tmp_path / "half.mp4", (0.0,), crop=(0, 0, 48, 40), **cut))
    right = decode.decode_frames(
        request(tmp_path / "half.mp4", (0.0,), crop=(16, 52, 48, 44), **cut)
    )
    assert left.shape == (1, 16, 16, 3) and left.dtype == np.uint8
    assert left.max() < 12 and right.min() > 228


def test_colours_come_back(tmp_path: Path):
    colours = [(232, 36, 40), (40, 200, 60), (48, 84, 244), (244, 224, 36)]
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    for index, colour in enumerate(colours):
        frames[:, :, 16 * index : 16 * index + 16] = colour
    encode_h264(frames, 8, tmp_path / "c.mp4", crf=10)
    size = {"shown": (32, 64), "crop": (0, 0, 32, 64), "width": 64}
    clip = decode.decode_frames(request(tmp_path / "c.mp4", (0.0,), **size))
    seen = clip[0, 16, 8::16].astype(int)
    assert np.abs(seen - colours).max() <= 6


def test_equal_frames_make_equal_files_and_odd_sizes_are_refused(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 255, (5, 48, 48, 3), np.uint8)
    files = []
    for number in range(4):
        encode_h264(noise, 29.97, tmp_path / f"{number}.mp4")
        files.append((tmp_path / f"{number}.mp4").read_bytes())
    assert len(set(files)) == 1
    assert files[0].index(b"moov") < files[0].index(b"mdat"), "the index is at the front"
    with pytest.raises(UserError, match="31x48.*must be even.*32x48"):
        encode_h264(numbered(2, 31, 48), 8, tmp_path / "odd.mp4")
    assert sorted(os.listdir(tmp_path)) == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "no_video"])
def test_damaged_files_are_bad_clips(tmp_path: Path, damage: str):
    path = write_clip(tmp_path / "a.mp4", count=20)
    data = path.read_bytes()
    damaged = {
        "empty": b"",
        "text": b"no video at all\n" * 50,
        "cut": data[:300],
        "no_video": data[:40],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(BadClip, match="unreadable"):
        probe(path)


def test_storage_is_told_from_damage(tmp_path: Path):
    path = write_clip(tmp_path / "a.mp4")
    size = path.stat().st_size
    with refuses(StorageFault, "a.mp4", "bytes before", "index"):
        decode.decode_frames(request(path, (0.0, 1.0), length=size + 9999))
    path.unlink()
    with pytest.raises(StorageFault, match="No such file"):
        probe_video(ProbeRequest(0, "a", str(path), 0, size, "video"))


def test_a_header_that_asks_for_too_much_memory_costs_its_clip_only(tmp_path: Path):
    """libav's ENOMEM is an error of memory as the operating system's is, and no storage failed."""
    good, greedy = write_clip(tmp_path / "good.mp4"), write_clip(tmp_path / "greedy.mp4")
    data = bytearray(greedy.read_bytes())
    size = data.index(b"stsd") + 12
    data[size : size + 4] = (0x7F000000).to_bytes(4, "big")
    greedy.write_bytes(data)
    with pytest.raises(BadClip) as caught:
        probe(greedy)
    assert isinstance(caught.value.__cause__, MemoryError)
    with DecodePool(1, timeout=240) as pool:
        lost = pool.submit(request(greedy, (0.0,))).result(timeout=240)
        assert isinstance(lost, Failure) and lost.reason == "unreadable"
        assert len(pool.submit(request(good, (0.0,))).result(timeout=240)) == 1


def test_errors_show_no_objects(tmp_path: Path):
    path = tmp_path / "b.png"
    path.write_bytes(b"no picture at all\n" * 50)
    with pytest.raises(BadClip) as caught:
        probe(path)
    assert "picture" in caught.value.detail and "0x" not in caught.value.detail
    assert (
        decode.in_words(ValueError(f"cannot read {object()} twice")) == "cannot read the file twice"
    )


def test_a_title_in_another_encoding_costs_no_clip(tmp_path: Path):
    path = write_clip(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes().replace(b"Lavf", b"L\xe4\xf6f"))
    assert probe(path).frames == 9


# -- real clips -------------------------------------------------------------------------------


def test_real_clips_are_what_their_readme_says():
    expected = {
        "nasa.mp4": ("h264", 325, 25.0, 180, 320),
        "bars_av1.mkv": ("av1", 125, 25.0, 360, 640),
        "h264_10bit.mp4": ("h264", 30, 30.0, 200, 200),
        "h265.mp4": ("hevc", 10, 10.0, 128, 128),
        "rotated_90.mov": ("h264", 3, 30.0, 568, 320),
    }
    for name, known in expected.items():
        found = probe(real_clips() / name)
        assert (found.codec, found.frames, found.fps, found.height, found.width) == known, name
    with pytest.raises(BadClip, match="after 28 of 50 frames"):
        probe(real_clips() / "corrupted.mp4")


@pytest.mark.parametrize("name", ["bars_av1.mkv", "nasa.mp4", "press.mp4", "h265.mp4"])
def test_seeking_in_real_clips_gives_the_frames_of_decoding_through(name: str, monkeypatch):
    fps = probe(real_clips() / name).fps
    count = probe(real_clips() / name).frames
    times = tuple(frame / fps for frame in range(count - 9, count, 2))
    monkeypatch.setattr(decode, "SEEK_WORTH_SECONDS", 0.0)
    sought = decode.decode_frames(real(name, times))
    monkeypatch.setattr(decode, "SEEK_WORTH_SECONDS", 1e9)
    assert (sought == decode.decode_frames(real(name, times))).all()
    assert len({frame.tobytes() for frame in sought}) == len(times), "each time shows another frame"


def test_rotated_clip_is_turned_clockwise():
    clip = decode.decode_frames(real("rotated_90.mov", (0.0,)))
    path = real_clips() / "rotated_90.mov"
    assert clip.shape == (1, 568, 320, 3)
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert (np.rot90(stored, -1) == clip[0]).all()


@pytest.mark.parametrize("name", ["press.mp4", "h265.mp4", "rotated_90.mov", "hiker.mp4"])
def test_decord_gives_the_same_frames(name: str):
    pytest.importorskip("decord")
    from sora_train.data.decode import decord as decode_decord

    fps = probe(real_clips() / name).fps
    asked = real(name, tuple(frame / fps for frame in (0, 1, 2)))
    ours = decode.decode_frames(asked).astype(int)
    theirs = decode_decord.decode_frames(asked).astype(int)
    assert np.abs(ours - theirs).mean() < 3


def test_decord_in_a_process(tmp_path: Path):
    pytest.importorskip("decord")
    path = write_clip(tmp_path / "a.mp4", height=64, width=64)
    size = {
        "shown": (64, 64),
        "crop": (0, 0, 64, 64),
        "height": 64,
        "width": 64,
        "backend": "decord",
    }
    with DecodePool(1, timeout=240) as pool:
        clip = pool.submit(request(path, (0.3, 0.5, 1.0), **size)).result(timeout=240)
    assert [number_of(frame) for frame in clip] == [2, 4, 8]


# -- processes --------------------------------------------------------------------------------


def test_pool_gives_frames_and_failures(tmp_path: Path):
    good = write_clip(tmp_path / "good.mp4")
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"x" * 5000)
    with DecodePool(2, timeout=240) as pool:
        futures = [pool.submit(request(path, (0.0, 0.5))) for path in (good, bad, good)]
        first, second, third = (future.result(timeout=240) for future in futures)
        assert [number_of(frame) for frame in first] == [0, 4]
        assert (first == third).all()
        assert isinstance(second, Failure) and (second.row, second.reason) == (7, "unreadable")
        missing = pool.submit(request(good, (0.0,), length=10**6))
        with refuses(Fault, "cannot read", "good.mp4", "storage"):
            missing.result(timeout=240)


@pytest.mark.parametrize(
    ("action", "reason"), [("spin", "decode_timeout"), ("abort", "decoder_crashed")]
)
def test_a_clip_that_spins_or_aborts_costs_that_clip_only(tmp_path, monkeypatch, action, reason):
    monkeypatch.setenv(TEST_HOOK, f"{action}=evil")
    good, evil = write_clip(tmp_path / "good.mp4"), write_clip(tmp_path / "evil.mp4")
    with DecodePool(1, timeout=240) as pool:
        assert len(pool.submit(request(good, (0.0,))).result(timeout=240)) == 1
        (before,) = pool.pids
        began = time.monotonic()
        lost = pool.submit(request(evil, (0.0,)), timeout=1.0).result(timeout=240)
        assert (lost.row, lost.reason) == (7, reason)
        assert time.monotonic() - began < 60
        assert number_of(pool.submit(request(good, (1.0,))).result(timeout=240)[0]) == 8
        assert pool.pids != [before], "the process was replaced"
        assert not Path(f"/proc/{before}").exists()


@pytest.mark.parametrize("action", ["spin", "abort"])
def test_a_bad_clip_among_others_in_a_message_costs_itself_only(tmp_path, monkeypatch, action):
    """Light clips travel together, heavy ones and those with another deadline alone."""
    monkeypatch.setenv(TEST_HOOK, f"{action}=evil")
    paths = [write_clip(tmp_path / f"{name}.mp4") for name in ("a", "b", "evil", "c", "d", "e")]
    sent: list[int] = []
    send = pipe.send
    monkeypatch.setattr(
        pipe, "send", lambda fd, message: (sent.append(len(message[1])), send(fd, message))
    )
    with DecodePool(1, timeout=240) as pool:
        wide = pool.submit(request(paths[0], (0.0,), height=640, width=960), timeout=5.0)
        asked = [request(path, (0.5, 1.0)) for path in paths]
        futures = [pool.submit(one, timeout=5.0) for one in asked]
        slow = pool.submit(request(paths[0], (0.0,)), timeout=239.0)
        assert wide.result(timeout=240).shape == (1, 640, 960, 3)
        for path, future in zip(paths, futures, strict=True):
            clip = future.result(timeout=240)
            if path.stem == "evil":
                assert (clip.row, clip.reason[:6]) == (7, "decode")
            else:
                assert [number_of(frame) for frame in clip] == [4, 8], path.stem
        assert number_of(slow.result(timeout=240)[0]) == 0
    assert sent[:2] == [1, 6] and set(sent[2:]) == {1}
    assert not request(paths[0], (0.0,), height=640, width=960).is_light
    assert not replace(asked[0], length=1 << 20).is_light and asked[0].is_light


@pytest.mark.skipif(
    sys.platform != "linux", reason="real-time scheduling is asked for as Linux does"
)
def test_decode_processes_of_a_real_time_parent_are_ordinary_ones(tmp_path: Path):
    """Else a clip that spins would starve even the thread that is to end it, on the same core."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        pytest.skip("real-time scheduling is not allowed here")
    try:
        # Its threads inherit the scheduling, and their processes in turn.
        pool = DecodePool(1, timeout=240)
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    with pool:
        good = write_clip(tmp_path / "good.mp4")
        pool.submit(request(good, (0.0,))).result(timeout=240)
        assert os.sched_getscheduler(pool.pids[0]) == os.SCHED_OTHER


def test_a_killed_child_is_replaced(tmp_path: Path):
    good = write_clip(tmp_path / "good.mp4")
    with DecodePool(1, timeout=240) as pool:
        pool.submit(request(good, (0.0,))).result(timeout=240)
        os.kill(pool.pids[0], signal.SIGKILL)
        # Killed by someone else, so the clip that was asked for next is not to blame.
        assert number_of(pool.submit(request(good, (1.0,))).result(timeout=240)[0]) == 8


def files_held(pid: int) -> set[str]:
    """The files a process has open."""
    held = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        # It may close one while we look.
        with contextlib.suppress(FileNotFoundError):
            held.add(os.readlink(entry))
    return held


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which files a process holds")
def test_a_killed_child_is_replaced_alone_and_none_inherits_a_file(tmp_path: Path):
    good = write_clip(tmp_path / "good.mp4")
    with open(good, "rb") as file, DecodePool(2, timeout=240) as pool:
        os.set_inheritable(file.fileno(), True)
        for _ in range(4):
            pool.submit(request(good, (0.0,)))
        while len(pool.pids) < 2:
            time.sleep(0.05)
        killed, other = pool.pids
        os.kill(killed, signal.SIGKILL)
        for future in [pool.submit(request(good, (1.0,))) for _ in range(12)]:
            assert number_of(future.result(timeout=240)[0]) == 8
        # The other child may have answered them all before anyone asked the killed one.
        deadline = time.monotonic() + 60
        while killed in pool.pids and time.monotonic() < deadline:
            assert number_of(pool.submit(request(good, (1.0,))).result(timeout=240)[0]) == 8
        assert other in pool.pids and killed not in pool.pids
        for pid in pool.pids:
            assert str(good) not in files_held(pid), "a clip is open only while it is decoded"
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            assert b"sora_train.data.decode.worker" in command, "a program, not a fork"


def test_closing_ends_children_at_once_even_spinning_ones(tmp_path, monkeypatch):
    monkeypatch.setenv(TEST_HOOK, "spin=evil")
    pool = DecodePool(2, timeout=600)
    good = write_clip(tmp_path / "good.mp4")
    pool.submit(request(good, (0.0,))).result(timeout=240)
    futures = [pool.submit(request(write_clip(tmp_path / "evil.mp4"), (0.0,))) for _ in range(4)]
    time.sleep(0.2)
    pids = pool.pids
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 60
    assert all(future.done() for future in futures)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_children_end_with_their_parent(tmp_path: Path):
    path = write_clip(tmp_path / "evil.mp4")
    code = f"""
import os, time
from sora_train.data.decode.probe import ProbeRequest
from sora_train.data.decode.pool import DecodePool
pool = DecodePool(1, timeout=600)
ask = lambda key: pool.submit(ProbeRequest(0, key, {str(path)!r}, 0, {path.stat().st_size}, "video"))
ask("good").result()
ask("evil")
time.sleep(0.5)
print(pool.pids[0], flush=True)
os._exit(0)
"""
    environment = {**os.environ, TEST_HOOK: "spin=evil"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=True
    )
    child = Path("/proc") / done.stdout.strip()
    deadline = time.monotonic() + 10
    while child.exists() and "State:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def test_a_decode_process_never_loads_torch():
    code = (
        "import sys, sora_train.data.decode.worker, sora_train.data.index.shapes_worker, sora_train.data.loader, "
        "sora_train.data.index.folder, sora_train.data.index.shapes_source, sora_train.data.index.shard_writer; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
