"""The watermark: found by its key alone after what a video goes through, and by no other key in nothing else."""

import stat
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from sentences import refuses

from sora_train.data.decode.video_io import encode_h264
from sora_train.errors import UserError
from sora_train.serving.parts import open_watermark
from sora_train.serving.provenance import detection, pattern
from sora_train.serving.provenance.watermark import FULL, Watermark
from sora_train.serving.provenance.whitening import MAX_FRAMES, flat, looked_at
from sora_train.serving.settings import Settings

KEY = b"a key of the tests"


def moving(frames: int = 16, height: int = 256, width: int = 320) -> np.ndarray:
    """Smooth noise that slides by, uint8 (T, H, W, 3): no rendered edges, no real clip, the same everywhere."""
    draws = np.random.default_rng(5)
    waves = np.fft.fftfreq(512)
    falling = 1 / np.maximum(np.hypot(waves[:, None], waves[None]), 1 / 128) ** 1.4
    field = np.fft.ifft2(np.fft.fft2(draws.normal(size=(512, 512))) * falling).real
    field = np.clip(128 + 45 * field / field.std(), 20, 235).astype(np.uint8)
    return np.stack(
        [
            np.repeat(np.roll(field, (t, 2 * t), (0, 1))[:height, :width, None], 3, axis=2)
            for t in range(frames)
        ]
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clips") / "source.mp4"
    encode_h264(moving(), 24, path)
    return path


@pytest.fixture(scope="module")
def marked(source: Path) -> Path:
    path = source.with_name("marked.mp4")
    Watermark(KEY).mark(source, path)
    return path


def lumas(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray()[: frame.height] for frame in container.decode(video=0)])


def written_again(path: Path, out: Path, crop: float, scale: float, crf: int) -> Path:
    """Cropped off its centre, scaled, compressed."""
    with av.open(str(path)) as given, av.open(str(out), "w") as made:
        stream = None
        for frame in given.decode(video=0):
            rgb = frame.to_ndarray(format="rgb24")
            height, width = (int(side * crop) // 2 * 2 for side in rgb.shape[:2])
            cut = np.ascontiguousarray(rgb[-height:, 4 : 4 + width])
            size = (int(width * scale) // 2 * 2, int(height * scale) // 2 * 2)
            if stream is None:
                stream = made.add_stream("libx264", rate=24, options={"crf": str(crf)})
                stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            picture = av.VideoFrame.from_ndarray(cut, format="rgb24")
            made.mux(stream.encode(picture.reformat(*size, "yuv420p")))
        made.mux(stream.encode(None))
    return out


@pytest.mark.parametrize(
    ("crop", "scale", "crf"),
    [(1, 1, 28), (1, 0.5, 12), (0.8, 1, 12), (0.8, 0.5, 28), (0.7, 1.3, 23)],
)
def test_the_key_finds_its_mark_after_what_videos_go_through(
    crop: float, scale: float, crf: int, marked: Path, tmp_path: Path
) -> None:
    after = written_again(marked, tmp_path / "after.mp4", crop, scale, crf)
    found = Watermark(KEY).detect(after)
    assert (
        found.present and found.score > detection.THRESHOLD and found.chance < detection.FALSE_ALARM
    )
    assert found.crop == pytest.approx(crop, rel=0.02)
    assert not Watermark(b"another key of theirs").detect(after).present


@pytest.mark.parametrize("named", [True, False])
def test_what_the_server_marks_is_found_by_the_key_that_it_keeps(
    source: Path, tmp_path: Path, named: bool
) -> None:
    """The file of the key, given to `sora verify`, is the one that the settings name or the data folder holds."""
    path = tmp_path / ("mine.key" if named else "watermark.key")
    mark = open_watermark(Settings(data=str(tmp_path), watermark_key=str(path) if named else ""))
    assert mark is not None
    mark(source, tmp_path / "delivered.mp4")
    assert Watermark.read(path).detect(tmp_path / "delivered.mp4").present


def test_the_marked_video_is_close_to_its_source(source: Path, marked: Path) -> None:
    before, after = lumas(source).astype(float), lumas(marked).astype(float)
    error = np.mean((before - after) ** 2)
    assert min(before.shape[1:]) >= FULL
    assert 10 * np.log10(255**2 / error) >= 40
    assert not Watermark(KEY).detect(source).present


def test_black_stays_black(tmp_path: Path) -> None:
    """Grain would be seen on black bars, and what lies below black is cut off."""
    clip = moving(4)
    clip[:, :64] = 0
    encode_h264(clip, 24, tmp_path / "bars.mp4")
    Watermark(KEY).mark(tmp_path / "bars.mp4", tmp_path / "out.mp4")
    assert np.abs(lumas(tmp_path / "out.mp4")[:, :56].astype(int) - 16).max() <= 1


def test_times_colours_and_sound_are_those_of_the_source(source: Path, tmp_path: Path) -> None:
    given, out = tmp_path / "sound.mp4", tmp_path / "out.mp4"
    with av.open(str(given), "w") as made:
        video = made.add_stream("libx264", rate=24)
        video.width, video.height, video.pix_fmt = 320, 256, "yuv420p"
        video.codec_context.time_base = Fraction(1, 90_000)
        sound = made.add_stream("aac", rate=8000)
        for number, rgb in enumerate(moving(5)):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = 4000 * number * number, Fraction(1, 90_000)
            made.mux(video.encode(frame))
        tone = av.AudioFrame.from_ndarray(
            np.sin(np.arange(8000, dtype=np.float32) / 5)[None], format="fltp", layout="mono"
        )
        tone.sample_rate = 8000
        made.mux(sound.encode(tone))
        made.mux(video.encode(None))
        made.mux(sound.encode(None))
    Watermark(KEY).mark(given, out)

    def told(path: Path) -> tuple:
        with av.open(str(path)) as container:
            times = [frame.time for frame in container.decode(video=0)]
        with av.open(str(path)) as container:
            tones = [bytes(packet) for packet in container.demux(audio=0)]
        return times, tones

    assert told(given) == told(out)
    Watermark(KEY).mark(source, out)
    with av.open(str(source)) as one, av.open(str(out)) as other:
        contexts = [each.streams.video[0].codec_context for each in (one, other)]
        assert (
            len({(c.colorspace, c.color_range, c.color_primaries, c.color_trc) for c in contexts})
            == 1
        )


def test_the_score_of_other_keys_obeys_its_bound() -> None:
    """P(Z >= z) <= exp(-z^2 / 2) at one place, whatever the picture: here stripes, which no noise model fits."""
    picture = np.sign(np.sin(np.arange(96)[:, None] / 2.2) * np.sin(np.arange(128)[None] / 3.1))
    place = next(detection.spectrum(picture, 1 / 96))
    keys = [pattern.phases(b"%d" % number) for number in range(2000)]
    scores = np.array([float(np.vdot(key, place).real) for key in keys])
    assert scores.mean() == pytest.approx(0, abs=0.1) and scores.std() == pytest.approx(1, rel=0.1)
    for z in (1.0, 2.0, 3.0):
        assert np.mean(scores >= z) <= np.exp(-z * z / 2) + 0.01
    assert detection.PLACES * np.exp(-(detection.THRESHOLD**2) / 2) == pytest.approx(
        detection.FALSE_ALARM
    )


def test_scores_are_those_of_every_shift() -> None:
    """Against the sum written out at a few places."""
    key = pattern.phases(KEY)
    place = next(detection.spectrum(flat(moving(1)[0, :96, :128, 0]), 1 / 96))
    surface = detection.scores(place, key)
    for down, right in ((0, 0), (5, 17), (127, 64)):
        moved = pattern.shifted(key, down / detection.GRID, right / detection.GRID)
        assert surface[down, right] == pytest.approx(np.vdot(moved, place).real, abs=1e-4)


def test_a_drawn_pattern_is_found_where_it_lies() -> None:
    key = pattern.phases(KEY)
    drawn = pattern.drawn(
        pattern.shifted(key * pattern.band(0, 1 / 128), 10 / 128, 37 / 128), 128, 192
    )
    surface = detection.scores(next(detection.spectrum(drawn, 1 / 128)), key)
    assert np.unravel_index(surface.argmax(), surface.shape) == (10, 37)


def test_phases_are_uniform_and_opposite_waves_are_conjugate() -> None:
    waves = pattern.phases(KEY)
    np.testing.assert_allclose(waves, waves[::-1, ::-1].conj())
    half = waves.ravel()[: waves.size // 2]
    for power in (1, 2, 3):
        assert abs(np.mean(half**power)) < 3 / np.sqrt(half.size)
    assert np.abs(np.vdot(half, pattern.phases(KEY + b"2").ravel()[: half.size])) < 3 * np.sqrt(
        half.size
    )


def test_long_videos_are_looked_at_in_so_many_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = np.tile(
        np.arange(64, dtype=np.uint8)[None, None, :, None], (MAX_FRAMES * 2 + 5, 64, 1, 3)
    )
    encode_h264(frames, 24, tmp_path / "long.mp4")
    seen = []
    monkeypatch.setattr(
        "sora_train.serving.provenance.whitening.flat", lambda luma: seen.append(1) or flat(luma)
    )
    looked_at(tmp_path / "long.mp4")
    assert MAX_FRAMES <= len(seen) <= MAX_FRAMES + 3


def test_what_is_no_video_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    text, out = tmp_path / "text.mp4", tmp_path / "out" / "marked.mp4"
    text.write_text("no video")
    out.parent.mkdir()
    for path in (text, tmp_path / "missing.mp4"):
        with refuses(UserError, str(path)):
            Watermark(KEY).mark(path, out)
        with refuses(UserError, str(path)):
            Watermark(KEY).detect(path)
    assert list(out.parent.iterdir()) == []


def test_a_key_file_is_made_once_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "data" / "watermark.key"
    first = Watermark.made(path)
    written = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(written.strip()) == 64
    second = Watermark.made(path)
    assert path.read_bytes() == written and list(path.parent.iterdir()) == [path]
    np.testing.assert_array_equal(first._phases, second._phases)
    with refuses(UserError, "16 bytes", "openssl"):
        Watermark(b"short")
    with refuses(UserError, str(tmp_path / "none"), "check its path"):
        Watermark.read(tmp_path / "none")
