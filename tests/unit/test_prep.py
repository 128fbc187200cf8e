"""From real files to shards: all are accounted for, and the output appears whole or not at all."""

import os
from pathlib import Path

import pytest
from clip_files import real_clips, write_clip
from sentences import refuses

from data_prep.shards import write_shards
from sora_train.data.index.folder import open_source
from sora_train.data.storage.ranges import read_bytes
from sora_train.errors import UserError


def folder_of_clips(folder: Path) -> Path:
    far = f"{'stock footage ' * 4}/{'golden-retriever-' * 5}кот"
    (folder / far).parent.mkdir(parents=True)
    (folder / "deep").mkdir()
    for name in ("a.mp4", "deep/a.mp4", "deep-a.mp4", "b.v2.mp4", f"{far}.mp4"):
        write_clip(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    (folder / "bad.mp4").write_bytes(b"x" * 999)
    return folder


def test_used_and_dropped_are_all(tmp_path: Path):
    source = folder_of_clips(tmp_path / "in")
    manifest = write_shards(str(source), str(tmp_path / "out"), max_shard_bytes=1)
    assert len(manifest) == 6 and manifest.dropped() == {"unreadable": 1}
    assert len(set(manifest.key)) == 6 and len(set(manifest.shard)) == 6
    for row, key in enumerate(manifest.key):
        if not manifest.drop_reason[row]:
            name = manifest.caption[row].removeprefix("caption of ")
            data = read_bytes(manifest.path(row), manifest.offset[row], manifest.length[row])
            assert data == (source / name).read_bytes(), key
    again = open_source(str(tmp_path / "out"), work_dir=tmp_path)
    assert again.digest() == manifest.digest()
    assert sorted(os.listdir(tmp_path)) == ["in", "out"], "no temporary folder is left"


def test_output_that_is_not_empty_is_refused_before_work(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with refuses(UserError, "empty folder"):
        write_shards(str(tmp_path / "nowhere"), str(tmp_path / "out"))


def test_nothing_is_left_where_it_fails(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        write_shards(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_real_clips(tmp_path: Path):
    clips = real_clips()
    manifest = write_shards(
        str(clips), str(tmp_path / "out"), captions=str(clips / "captions.jsonl")
    )
    assert manifest.dropped() == {"unreadable": 1}
    frames = dict(zip(manifest.key.tolist(), manifest.frames.tolist(), strict=True))
    assert frames["nasa"] == 325 and frames["h265"] == 10 and frames["motorcycle_4k"] == 120
    row = manifest.key.tolist().index("rotated_90")
    assert manifest.height[row] > manifest.width[row], "a portrait video"
    row = manifest.key.tolist().index("corrupted.mp4")
    assert "28 of 50" in manifest.drop_detail[row]
