"""Opening a source of any form: everything is listed, once, with the reason where it cannot be used."""

import gzip
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clip_files import numbered, write_clip
from PIL import Image
from sentences import refuses

from sora_train.data.index.folder import open_source
from sora_train.data.manifest import COLUMNS, Manifest, empty_row
from sora_train.errors import UserError


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


def opened(source: Path, tmp_path: Path, **options: object) -> Manifest:
    return open_source(str(source), work_dir=tmp_path / "work", **options)


def write_captions(folder: Path, captions: dict[str, str]) -> None:
    lines = [json.dumps({"file": name, "caption": caption}) for name, caption in captions.items()]
    (folder / "captions.jsonl").write_text("\n".join(lines))


def test_round_trip_and_digest(tmp_path: Path):
    rows = [
        empty_row(key=str(n), caption=f"clip {n}", fps=n / 3, vfr=bool(n % 2), offset=2**40)
        for n in range(5)
    ]
    manifest = Manifest.from_rows(rows, tmp_path)
    manifest.save(tmp_path / "m.parquet")
    again = Manifest.load(tmp_path / "m.parquet")
    for name in COLUMNS:
        assert getattr(manifest, name).dtype == getattr(again, name).dtype
        assert (getattr(manifest, name) == getattr(again, name)).all()
    assert again.digest() == manifest.digest() and again.root == tmp_path
    changed = [*rows[:-1], {**rows[-1], "caption": "another"}]
    assert Manifest.from_rows(changed, tmp_path).digest() != manifest.digest()
    assert manifest.select(np.array([3, 1])).key.tolist() == ["3", "1"]
    assert os.listdir(tmp_path) == ["m.parquet"]


def test_what_is_no_manifest_is_refused(tmp_path: Path):
    (tmp_path / "manifest.parquet").write_bytes(b"nonsense")
    with refuses(UserError, "manifest"):
        opened(tmp_path, tmp_path)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "manifest.parquet")
    with refuses(UserError, "version"):
        opened(tmp_path, tmp_path)


def test_plain_folder_with_sidecars(tmp_path: Path, clip: Path):
    folder = tmp_path / "clips"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(clip, folder / "a.mp4")
    shutil.copy(clip, folder / "deep" / "b.mp4")
    Image.fromarray(numbered(1)[0]).save(folder / "deep" / "c.png")
    (folder / "a.txt").write_text("a caption\n")
    (folder / "deep" / "c.txt").write_text("a picture")
    (folder / "bad.mp4").write_bytes(b"broken" * 99)
    (folder / "bad.txt").write_text("broken")
    (folder / "notes.md").write_text("not a clip")
    manifest = opened(folder, tmp_path)
    assert manifest.key.tolist() == ["a.mp4", "bad.mp4", "deep/b.mp4", "deep/c.png"]
    assert manifest.caption.tolist() == ["a caption", "broken", "", "a picture"]
    assert manifest.drop_reason.tolist() == ["", "unreadable", "no_caption", ""]
    assert manifest.drop_detail[1]
    assert manifest.kind.tolist()[3] == "image" and manifest.frames.tolist() == [9, 0, 9, 1]
    assert manifest.dropped() == {"unreadable": 1, "no_caption": 1}
    kept = opened(folder, tmp_path, allow_empty_captions=True)
    assert kept.dropped() == {"unreadable": 1}


def test_index_is_kept_until_the_source_changes(tmp_path: Path, clip: Path):
    folder = tmp_path / "clips"
    folder.mkdir()
    shutil.copy(clip, folder / "a.mp4")
    write_captions(folder, {"a.mp4": "one"})
    seen: list[tuple[int, int]] = []

    def count(done: int, total: int) -> None:
        seen.append((done, total))

    first = opened(folder, tmp_path, progress=count)
    assert seen == [(1, 1)]
    assert opened(folder, tmp_path, progress=count).digest() == first.digest()
    assert seen == [(1, 1)], "the second time nothing was probed"
    write_captions(folder, {"a.mp4": "two"})
    assert opened(folder, tmp_path, progress=count).caption.tolist() == ["two"]
    shutil.copy(clip, folder / "b.mp4")
    assert len(opened(folder, tmp_path, progress=count)) == 2
    assert len(seen) == 4


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_tables(tmp_path: Path, clip: Path, suffix: str):
    (tmp_path / "sub").mkdir()
    shutil.copy(clip, tmp_path / "sub" / "a.mp4")
    shutil.copy(clip, tmp_path / "b.mp4")
    shutil.copy(clip, tmp_path / "unlisted.mp4")
    table = tmp_path / f"clips.{suffix}"
    rows = {"path": ["sub/a.mp4", "b.mp4"], "text": ['says "hi", twice', "b"]}
    if suffix == "csv":
        table.write_text('path,text\nsub/a.mp4,"says ""hi"", twice"\nb.mp4,b\n')
    elif suffix == "parquet":
        pq.write_table(pa.table(rows), table)
    else:
        table.write_text(
            "\n".join(
                json.dumps(dict(zip(rows, row, strict=True)))
                for row in zip(*rows.values(), strict=True)
            )
        )
    manifest = opened(table, tmp_path)
    assert manifest.key.tolist() == rows["path"] and manifest.caption.tolist() == rows["text"]
    assert manifest.path(0) == str(tmp_path / "sub" / "a.mp4")
    assert manifest.dropped() == {}
    with refuses(UserError, "data.captions", "leave", "empty"):
        opened(table, tmp_path, captions="other.csv")


def make_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    import io

    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_foreign_shards_in_place(tmp_path: Path, clip: Path):
    data = clip.read_bytes()
    folder = tmp_path / "tars"
    folder.mkdir()
    long_key = "k" * 150
    make_tar(
        folder / "0.tar",
        [
            ("x/a.txt", b"first"),
            ("x/a.mp4", data),
            ("x/a.jpg", b"a poster"),
            ("b.json", b'{"caption": "second", "n": 1}'),
            ("b.mp4", data),
            (f"{long_key}.mp4", data),
            (f"{long_key}.txt", b"third"),
            ("only_text.txt", b"none"),
        ],
    )
    manifest = opened(folder, tmp_path)
    assert manifest.key.tolist() == ["x/a", "b", long_key]
    assert manifest.caption.tolist() == ["first", "second", "third"]
    assert manifest.dropped() == {} and manifest.kind.tolist() == ["video"] * 3
    for row in range(3):
        with open(manifest.path(row), "rb") as file:
            file.seek(manifest.offset[row])
            assert file.read(manifest.length[row]) == data


def test_a_tar_cut_in_the_middle_keeps_what_is_whole(tmp_path: Path, clip: Path):
    data = clip.read_bytes()
    folder = tmp_path / "tars"
    folder.mkdir()
    members = [
        (f"{n}.{e}", data if e == "mp4" else b"text") for n in range(3) for e in ("txt", "mp4")
    ]
    whole = make_tar(folder / "0.tar", members).read_bytes()
    cut = whole.index(data, whole.index(b"2.mp4")) + 100
    (folder / "0.tar").write_bytes(whole[:cut])
    manifest = opened(folder, tmp_path)
    assert manifest.drop_reason.tolist() == ["", "", "unreadable"]
    assert "cut off" in manifest.drop_detail[2]


def test_bad_sources(tmp_path: Path, clip: Path):
    def refused(words: str, source: Path, **options: object) -> None:
        with pytest.raises(UserError, match=words):
            opened(source, tmp_path, **options)

    folder = tmp_path / "f"
    folder.mkdir()
    refused("does not exist; give a folder", tmp_path / "nowhere")
    refused("holds no clips", folder)
    refused("has no known form; give a folder", clip)
    shutil.copy(clip, folder / "a.mp4")
    refused(r"no clip .* has a caption: put .*captions\.jsonl", folder)
    write_captions(folder, {"a.mp4": "x", "gone.mp4": "y"})
    refused(r"names 1 of 2 files .*: gone\.mp4", folder)
    refused(r"data\.captions=.*no\.csv does not exist", folder, captions=str(tmp_path / "no.csv"))
    (folder / "captions.jsonl").write_text('{"file": "a.mp4"\n')
    refused("line 1: not JSON", folder)
    (folder / "captions.jsonl").write_text('{"name": "a.mp4"}\n')
    refused("row 1: no column names the clip", folder)
    write_captions(folder, {"a.mp4": "x"})
    make_tar(folder / "0.tar", [("a.mp4", b"1")])
    refused("both shards .* and loose clips", folder)

    packed = tmp_path / "packed"
    packed.mkdir()
    make_tar(packed / "0.tar.gz", [("a.mp4", b"1")], "w:gz")
    refused(r"0\.tar\.gz is a compressed tar.*unpack it first", packed)
    shutil.move(packed / "0.tar.gz", packed / "0.tar")
    refused(r"compressed \(gzip\) under the name of a plain tar", packed)
    (packed / "0.tar").write_bytes(
        gzip.decompress((packed / "0.tar").read_bytes())[:0] + b"junk" * 500
    )
    refused("is not a tar file", packed)
    make_tar(packed / "0.tar", [("a.mp4", b"1"), ("a.mkv", b"2")])
    refused("two clips under the key 'a'", packed)
