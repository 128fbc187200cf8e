"""The shard writer: what it writes is webdataset's, and the manifest knows where every byte lies."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from clip_files import write_clip
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentences import refuses

from sora_train.data.index.folder import open_source
from sora_train.data.index.shapes_source import prepare_shapes
from sora_train.data.index.shard_writer import ShardWriter
from sora_train.data.index.tars import list_tar
from sora_train.data.manifest import COLUMNS, Manifest
from sora_train.data.storage.ranges import StorageFault, read_bytes
from sora_train.errors import Fault, UserError

RNG = np.random.default_rng(0)
SAMPLES = [
    (f"key{n}", RNG.bytes(int(size)), "mp4" if n % 3 else "png", "" if n == 5 else f"caption {n}")
    for n, size in enumerate(RNG.integers(1, 5000, 30))
]


def write(folder: Path, **options: int) -> Manifest:
    with ShardWriter(folder, **options) as writer:
        for key, data, extension, caption in SAMPLES:
            writer.write(key, data, extension, caption, {"frames": 3})
    return Manifest.load(folder / "manifest.parquet")


def test_every_range_holds_its_sample(tmp_path: Path):
    manifest = write(tmp_path, max_bytes=20_000)
    assert len(set(manifest.shard)) > 3
    for row, (key, data, _, caption) in enumerate(SAMPLES):
        assert (manifest.key[row], manifest.caption[row], manifest.frames[row]) == (key, caption, 3)
        assert data == read_bytes(manifest.path(row), manifest.offset[row], manifest.length[row])


# Keys as people's folders give them: any script, deep paths; no dot, at which a key ends.
KEYS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="./"), min_size=1, max_size=60
)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(KEYS, min_size=1, max_size=8).map("/".join), unique=True, max_size=4))
@example(["k" * 92, "k" * 96, "k" * 100, "k" * 101, "k" * 300])
@example(["日本/クリップ", "красный квадрат", "d" * 155 + "/" + "e" * 90])
def test_every_range_holds_its_member_whatever_the_name(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str]
):
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder / "out", max_bytes=6000) as writer:
        for number, key in enumerate(keys):
            writer.write(
                key, bytes([number]) * (600 * number + 1), "mp4", f"of {key}", {"frames": 1}
            )
    manifest = Manifest.load(folder / "out" / "manifest.parquet")
    assert manifest.key.tolist() == keys
    for row, key in enumerate(keys):
        data = read_bytes(manifest.path(row), int(manifest.offset[row]), int(manifest.length[row]))
        with tarfile.open(manifest.path(row)) as tar:
            member = tar.extractfile(f"{key}.mp4")
            assert member is not None and data == member.read()
    found = open_listing(folder / "out") if keys else {}
    assert found == {
        key: (int(manifest.offset[row]), int(manifest.length[row]), manifest.caption[row].strip())
        for row, key in enumerate(keys)
    }


def open_listing(folder: Path) -> dict[str, tuple[int, int, str]]:
    """What indexing finds in the shards of a folder."""
    samples = [sample for tar in sorted(folder.glob("*.tar")) for sample in list_tar(tar)]
    return {sample.key: (sample.offset, sample.length, sample.caption) for sample in samples}


def test_a_shard_that_holds_other_bytes_than_were_written_gets_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def shifted(fd: int) -> None:
        """Storage that moves what was written by a block."""
        path = tmp_path / "out" / "shard-000000.tar.tmp"
        path.write_bytes(path.read_bytes()[512 * 2 :])

    with (
        refuses(Fault, "shard-000000.tar", "key1.mp4", "offset"),
        ShardWriter(tmp_path / "out") as writer,
    ):
        writer.write(*SAMPLES[1], {})
        writer.write(*SAMPLES[2], {})
        monkeypatch.setattr(os, "fsync", shifted)
    assert os.listdir(tmp_path / "out") == []


def test_webdataset_reads_them(tmp_path: Path):
    webdataset = pytest.importorskip("webdataset")
    write(tmp_path, max_bytes=20_000)
    shards = sorted(str(path) for path in tmp_path.glob("*.tar"))
    read = {
        s["__key__"]: s
        for s in webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
    }
    assert set(read) == {key for key, *_ in SAMPLES}
    for key, data, extension, caption in SAMPLES:
        assert read[key][extension] == data
        assert read[key].get("txt", b"").decode() == caption


def test_equal_samples_make_equal_shards(tmp_path: Path):
    write(tmp_path / "a"), write(tmp_path / "b")
    assert (tmp_path / "a/shard-000000.tar").read_bytes() == (
        tmp_path / "b/shard-000000.tar"
    ).read_bytes()


def test_nothing_is_left_by_an_error_or_shows_before_the_end(tmp_path: Path):
    with (
        pytest.raises(UserError, match="'key0' occurs twice"),
        ShardWriter(tmp_path, max_bytes=1) as writer,
    ):
        writer.write(*SAMPLES[0], {})
        writer.write(*SAMPLES[1], {})
        assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob("*.parquet"))
        writer.write(*SAMPLES[0], {})
    assert os.listdir(tmp_path) == []


def test_a_full_folder_is_refused(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("keep")
    with refuses(UserError, "not empty", "mine.txt"):
        ShardWriter(tmp_path)


def test_missing_and_short_shards_are_storage_faults(tmp_path: Path):
    manifest = write(tmp_path)
    end = int(manifest.offset[-1])
    os.truncate(tmp_path / manifest.shard[-1], end)
    with refuses(StorageFault, "before the index"):
        read_bytes(manifest.path(-1), end, 10)
    with refuses(UserError, "bytes", "indexed"):
        open_source(str(tmp_path), work_dir=tmp_path)
    os.unlink(tmp_path / manifest.shard[-1])
    with pytest.raises(StorageFault, match="No such file"):
        read_bytes(manifest.path(-1), end, 10)
    with refuses(UserError, "missing", "restore"):
        open_source(str(tmp_path), work_dir=tmp_path)


def test_dropped_samples_keep_their_row(tmp_path: Path):
    with ShardWriter(tmp_path) as writer:
        writer.write(*SAMPLES[1], {})
        writer.add_dropped({"key": "lost", "drop_reason": "unreadable", "drop_detail": "why"})
    manifest = open_source(str(tmp_path), work_dir=tmp_path)
    assert manifest.key.tolist() == ["key1", "lost"] and manifest.dropped() == {"unreadable": 1}


def test_shapes_manifest_is_what_indexing_its_shards_finds(tmp_path: Path):
    seen: list[int] = []
    made = prepare_shapes(
        tmp_path, split="train", num_clips=50, seed=3, progress=lambda done, _: seen.append(done)
    )
    assert len(made) == 50 and seen[-1] == 50 and set(made.kind) == {"video", "image"}
    (made.root / "manifest.parquet").rename(tmp_path / "kept.parquet")
    found = open_source(str(made.root), work_dir=tmp_path / "work")
    # Its clips are light, so nothing is measured by their coding.
    for name in COLUMNS.keys() - {"source", "coding"}:
        assert (getattr(found, name) == getattr(made, name)).all(), name
    assert found.digest() == made.digest()


def test_shapes_are_made_once_and_equal_everywhere(tmp_path: Path):
    first = prepare_shapes(tmp_path / "a", split="held_out", num_clips=12, seed=0, workers=1)
    stamp = (first.root / "manifest.parquet").stat().st_mtime_ns
    again = prepare_shapes(tmp_path / "a", split="held_out", num_clips=12, seed=0)
    assert (again.root / "manifest.parquet").stat().st_mtime_ns == stamp
    elsewhere = prepare_shapes(tmp_path / "b", split="held_out", num_clips=12, seed=0, workers=2)
    assert elsewhere.digest() == first.digest()
    other = prepare_shapes(tmp_path / "a", split="held_out", num_clips=12, seed=1)
    assert other.digest() != first.digest() and other.root != first.root
    with pytest.raises(UserError, match="split='test'"):
        prepare_shapes(tmp_path, split="test", num_clips=1, seed=0)


def test_tar_members_are_named_as_webdataset_wants(tmp_path: Path):
    clip = write_clip(tmp_path / "c.mp4").read_bytes()
    with ShardWriter(tmp_path / "out") as writer:
        writer.write("one", clip, "mp4", "text", {"frames": 9, "fps": 8.0})
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert tar.getnames() == ["one.json", "one.mp4", "one.txt"]
