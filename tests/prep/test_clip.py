"""Clips hold exactly the frames of their scene, as a player shows them; shards hold exactly the clips."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses

from data_prep.calls import checked
from data_prep.media.crop import CropConfig
from data_prep.media.made import MADE, columns_of
from data_prep.sources.listing import list_sources
from data_prep.stage import Workspace
from data_prep.stages import clip, encode, shard
from data_prep.stages.probe import ProbeConfig, probe
from sora_train.data.decode.frames import BadClip
from sora_train.data.decode.video_io import Encoding, encode_h264, stream_h264
from sora_train.data.index.folder import open_source
from sora_train.data.manifest import Manifest
from sora_train.errors import Fault

FPS = 12.0
NO_CROP = clip.ClipConfig(crop=CropConfig(bars=False, watermarks=False))


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames that say their number: eight vertical stripes, each a bit of it, white for one."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1
    frames = np.repeat(bits, width // 8, axis=1)[:, None, :, None] * 200 + 28
    return np.broadcast_to(frames, (count, height, width, 3)).astype(np.uint8)


def numbers_in(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    stripes = [one.reshape(one.shape[0], 8, -1).mean(axis=(0, 2)) > 128 for one in pictures]
    return [int((stripe << np.arange(8)).sum()) for stripe in stripes]


def probed(path: Path) -> dict:
    source = list_sources(str(path))[0]
    row = {name: getattr(source, name) for name in source.__dataclass_fields__}
    found = probe(
        pa.Table.from_pylist([row]), ProbeConfig(part_seconds=1000.0), Workspace(path.parent)
    )
    return {**row, **found.to_pylist()[0], "source": source.key}


def cut(path: Path, begin: float, end: float, out: Path, config=NO_CROP) -> dict:
    row = probed(path) | {"begin": begin, "end": end}
    table = pa.Table.from_pylist([row])
    made = checked(clip.STAGE, table, clip.clip(table, config, Workspace(out))).to_pylist()[0]
    return row | made | {"path": Workspace(out).files / made["file"]}


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    frames = ((None, frame) for frame in numbered(100))
    stream_h264(frames, FPS, path, Encoding(crf=10, gop=24))
    return path


@settings(deadline=None, max_examples=12)
@given(begin=st.integers(0, 95), length=st.integers(1, 40))
def test_a_clip_holds_the_frames_of_its_scene(
    film: Path, tmp_path_factory, begin: int, length: int
):
    end = min(100, begin + length)
    made = cut(film, begin / FPS, end / FPS, tmp_path_factory.mktemp("out"))
    assert numbers_in(made["path"]) == list(range(begin, end))
    assert made["frames"] == end - begin and made["fps"] == pytest.approx(FPS)
    assert made["duration"] == pytest.approx((end - begin) / FPS, abs=0.02)


@pytest.mark.parametrize("format", ["matroska", "mpegts"])
def test_of_every_container(film: Path, tmp_path: Path, format: str):
    path = tmp_path / f"film.{ {'matroska': 'mkv', 'mpegts': 'ts'}.get(format, format) }"
    with av.open(str(film)) as source, av.open(str(path), "w", format=format) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    made = cut(path, 40 / FPS, 70 / FPS, tmp_path)
    assert numbers_in(made["path"]) == list(range(40, 70))


def test_uneven_times_are_kept(tmp_path: Path):
    times = np.cumsum([0, 0.1, 0.05, 0.3, 0.1, 0.2, 0.1, 0.1, 0.4, 0.1])
    frames = zip(times.tolist(), numbered(10), strict=True)
    stream_h264(frames, 10, tmp_path / "film.mp4", Encoding())
    made = cut(tmp_path / "film.mp4", float(times[2]), float(times[8]), tmp_path)
    assert numbers_in(made["path"]) == list(range(2, 8))
    with av.open(str(made["path"])) as container:
        shown = [frame.time for frame in container.decode(video=0)]
    assert shown == pytest.approx((times[2:8] - times[2]).tolist(), abs=2e-4)


def test_a_copy_of_packets_lies_between_key_frames_and_is_without_loss(film: Path, tmp_path: Path):
    config = clip.ClipConfig(copy_packets=True)
    with av.open(str(film)) as container:
        keys = [n for n, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    first, last = min(k for k in keys if k >= 20), max(k for k in keys if k <= 80)
    made = cut(film, 20 / FPS, 80 / FPS, tmp_path, config)
    assert numbers_in(made["path"]) == list(range(first, last))
    assert (made["begin"], made["end"]) == pytest.approx((first / FPS, last / FPS))
    with av.open(str(film)) as source, av.open(str(made["path"])) as copied:
        wanted = [frame.to_ndarray() for frame in source.decode(video=0)][first:last]
        assert all(
            (a == b.to_ndarray()).all() for a, b in zip(wanted, copied.decode(video=0), strict=True)
        )
    with pytest.raises(BadClip, match="hold 1 key frames"):
        cut(film, first / FPS, (first + 5) / FPS, tmp_path, config)


def test_equal_input_gives_equal_bytes(film: Path, tmp_path: Path):
    first = cut(film, 1.0, 3.0, tmp_path / "a")
    second = cut(film, 1.0, 3.0, tmp_path / "b")
    assert first["digest"] == second["digest"] and first["file"] == second["file"]


REAL = {
    "rotated_90.mov": (320, 568),
    "h264_10bit.mp4": (200, 200),
    "bars_av1.mkv": (640, 360),
    "press.mp4": (832, 480),
}


@pytest.mark.parametrize("name", REAL)
def test_real_clips_look_as_the_source_does(name: str, tmp_path: Path):
    folder = os.environ.get("SORA_TEST_VIDEOS")
    if not folder:
        pytest.skip("SORA_TEST_VIDEOS is not set: no real clips to cut")
    row = probed(Path(folder) / name)
    begin = 0.0 if row["source_frames"] < 60 else 40 / row["source_fps"]
    end = begin + min(20, row["source_frames"]) / row["source_fps"]
    shutil.copy(Path(folder) / name, tmp_path / name)
    made = cut(tmp_path / name, begin, end, tmp_path)
    assert (made["width"], made["height"]) == REAL[name]
    first = round(begin * row["source_fps"])
    with av.open(str(tmp_path / name)) as source, av.open(str(made["path"])) as copied:
        wanted = [one.to_ndarray(format="rgb24") for one in source.decode(video=0)][
            first : first + made["frames"]
        ]
        shown = [one.to_ndarray(format="rgb24") for one in copied.decode(video=0)]
    assert len(shown) == len(wanted) == min(20, row["source_frames"])
    turned = [np.rot90(one, 3) for one in wanted] if name == "rotated_90.mov" else wanted
    error = np.mean([(a.astype(float) - b) ** 2 for a, b in zip(turned, shown, strict=True)])
    assert 10 * np.log10(255**2 / error) > 30, "not the same pictures in the same order"


def test_large_clips_are_scaled_down(tmp_path: Path):
    encode_h264(np.full((3, 240, 426, 3), 90, np.uint8), 8, tmp_path / "film.mp4")
    made = cut(tmp_path / "film.mp4", 0, 0.375, tmp_path, clip.ClipConfig(short_side=120))
    assert (made["height"], made["width"]) == (120, 212)


# -- shards ----------------------------------------------------------------------------------------


KEPT = ("source", "source_digest", "source_kind", "begin", "end", "crop")


def shard_rows(film: Path, out: Path, count: int = 4) -> pa.Table:
    rows = []
    for number in range(count):
        made = cut(film, number * 2.0, number * 2.0 + 1.5, out)
        rows.append(
            {
                **{name: made[name] for name in (*MADE, *KEPT)},
                "key": f"film.mp4#{number}", "caption": f"clip {number}", "captions": json.dumps({"short": "c"}),
                "licence": "CC0", "provenance": json.dumps({"url": "u"}), "motion": number / 10,
                "drop_stage": "", "drop_reason": "too_dull" if number == 2 else "", "drop_detail": "",
            }
        )  # fmt: skip
    return pa.Table.from_pylist(rows)


def test_shards_hold_the_kept_clips_and_where_they_come_from(film: Path, tmp_path: Path):
    out = tmp_path / "out"
    rows = shard_rows(film, out)
    table = shard.shard(rows, shard.ShardConfig(scores=("motion",)), Workspace(out))
    assert [bool(key) for key in table["shard_key"].to_pylist()] == [True, True, False, True]
    manifest = open_source(str(out), work_dir=tmp_path)
    assert manifest.caption.tolist() == ["clip 0", "clip 1", "clip 3"]
    provenance = json.loads(manifest.provenance[1])
    assert (
        provenance["source"] == "film.mp4"
        and provenance["licence"] == "CC0"
        and provenance["url"] == "u"
    )
    assert (provenance["begin"], provenance["end"]) == (2.0, 3.5)
    assert json.loads(manifest.scores[2]) == {"motion": 0.3}
    assert json.loads(manifest.captions[0]) == {"short": "c"}
    with tarfile.open(out / "shard-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    files = [
        Workspace(out).files / row["file"] for row in rows.to_pylist() if not row["drop_reason"]
    ]
    videos = [data for name, data in members.items() if name.endswith(".mp4")]
    assert videos == [file.read_bytes() for file in files]
    meta = json.loads(next(data for name, data in members.items() if name.endswith(".json")))
    assert meta["provenance"]["source"] == "film.mp4"


def test_shards_are_written_once_and_anew_where_something_changed(film: Path, tmp_path: Path):
    out = tmp_path / "out"
    rows = shard_rows(film, out)
    shard.shard(rows, shard.ShardConfig(), Workspace(out))
    first = (out / "shard-000000.tar").stat().st_mtime_ns, (out / "shard-000000.tar").read_bytes()
    shard.shard(rows, shard.ShardConfig(), Workspace(out))
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first[0]
    (out / "manifest.parquet").unlink()
    shard.shard(rows, shard.ShardConfig(), Workspace(out))
    assert (out / "shard-000000.tar").read_bytes() == first[1], "equal clips give equal bytes"
    assert len(Manifest.load(out / "manifest.parquet")) == 3
    shard.shard(rows.slice(0, 1), shard.ShardConfig(), Workspace(out))
    assert len(Manifest.load(out / "manifest.parquet")) == 1
    (Workspace(out).files / rows["file"][1].as_py()).unlink()
    with refuses(Fault, "is gone", "made again"):
        shard.shard(rows, shard.ShardConfig(), Workspace(out))


def test_smaller_copies_are_sets_of_their_own(film: Path, tmp_path: Path):
    out = tmp_path / "out"
    rows = shard_rows(film, out)
    config = encode.EncodeConfig(short_sides=(24, 480), gop=4)
    copies = encode.encode(rows, config, Workspace(out))
    assert [len(one) for one in copies["variants"].to_pylist()] == [1, 1, 1, 1], "none is enlarged"
    shard.shard(
        rows.append_column("variants", copies["variants"]), shard.ShardConfig(), Workspace(out)
    )
    small, large = (
        Manifest.load(out / "24p/manifest.parquet"),
        Manifest.load(out / "manifest.parquet"),
    )
    assert (
        small.key.tolist() == large.key.tolist()
        and set(small.height) == {24}
        and set(small.width) == {32}
    )
    assert small.frames.tolist() == large.frames.tolist() == [18, 18, 18]
    file = Workspace(out).files / copies["variants"].to_pylist()[1][0]["file"]
    assert numbers_in(file) == list(range(24, 42))
    with av.open(str(file)) as container:
        keys = [n for n, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    assert max(np.diff(keys)) <= 4


def test_made_columns_are_those_of_the_file(film: Path):
    made = columns_of(film.parent, film.name, "video")
    assert made["frames"] == 100 and made["bytes"] == film.stat().st_size and set(made) == set(MADE)
