"""Which files are clips, and where their bytes lie: every input is read, or counted with the reason."""

from pathlib import Path

from data_prep.shards import write_shards
from sora_train.data.index.folder import open_source
from sora_train.data.storage.ranges import read_bytes


def test_long_paths_in_shards(cases: Path, tmp_path: Path, row):
    source = open_source(str(cases / "30-names-paths"), work_dir=tmp_path, workers=1)
    made = write_shards(str(cases / "30-names-paths"), str(tmp_path / "out"), workers=1)
    for at in range(len(made)):
        data = read_bytes(made.path(at), int(made.offset[at]), int(made.length[at]))
        assert data == Path(source.path(at)).read_bytes(), made.key[at]
    again = open_source(str(tmp_path / "out"), work_dir=tmp_path)
    (tmp_path / "out" / "manifest.parquet").unlink()
    listed = open_source(str(tmp_path / "out"), work_dir=tmp_path, workers=1)
    assert again.dropped() == listed.dropped() == {}
    assert again.offset.tolist() == listed.offset.tolist()
    row(
        "30-names-paths",
        "webdataset#330, #428",
        f"{len(made)} clips",
        "ranges are the clips' bytes",
    )


def test_names_in_tars(cases: Path, tmp_path: Path, row):
    found = open_source(str(cases / "14-tar-names"), work_dir=tmp_path, workers=1)
    told = dict(zip(found.key.tolist(), found.drop_reason.tolist(), strict=True))
    # As in webdataset a key ends at the first dot: `2.txt` of `v1.0/b` is not the caption's extension.
    assert {key: told[key] for key in ("./a", "v1.0/b", "clip 2")} == {
        "./a": "", "v1.0/b": "no_caption", "clip 2": "no_caption"
    }  # fmt: skip
    assert len(found) == 4 and not told[max(told, key=len)]
    row(
        "14-tar-names",
        "datasets#7150, webdataset#288",
        "2 of 4 clips",
        "2 no_caption: their captions are 2.txt and 0 (final).txt",
    )


def test_rarer_kinds_of_media(cases: Path, tmp_path: Path, row):
    found = open_source(str(cases / "12-extensions"), work_dir=tmp_path, workers=1)
    kinds = dict(zip(found.key.tolist(), found.kind.tolist(), strict=True))
    assert kinds == {
        "a.ts": "video", "b.flv": "video", "c0.mp4": "video", "d.mpg": "video", "e.wmv": "video",
        "g.MP4": "video", "h.gif": "video", "i.bmp": "image", "j.tif": "image", "k.JPG": "image",
        "l.avif": "image",
    }  # fmt: skip
    assert found.dropped() == {} and all(found.caption)
    assert found.caption[found.key.tolist().index("k.JPG")] == "upper case text"
    assert found.left_out == {"without extension": 1}
    row("12-extensions", "ai-toolkit#358", "11 of 11 clips", "1 file without extension is left out")


def test_a_folder_of_rarer_kinds_alone(cases: Path, tmp_path: Path, row):
    found = open_source(
        str(cases / "12-only-unknown"), work_dir=tmp_path, workers=1, allow_empty_captions=True
    )
    assert found.dropped() == {} and len(found) == 4 and found.left_out == {".jsonl": 1}
    table = open_source(str(cases / "12-only-unknown" / "t.jsonl"), work_dir=tmp_path, workers=1)
    assert table.key.tolist() == ["a.ts"] and table.dropped() == {}
    row("12-only-unknown", "ai-toolkit#358", "4 of 4 clips", "1 .jsonl is left out")


def test_one_stem_of_two_kinds(cases: Path, tmp_path: Path, row):
    found = open_source(str(cases / "29-same-stem"), work_dir=tmp_path, workers=1)
    texts = dict(zip(found.key.tolist(), found.caption.tolist(), strict=True))
    assert found.dropped() == {} and texts.keys() == {"c0.mp4", "c0.png", "c1.mp4"}
    assert texts["c0.mp4"] == texts["c0.png"] == "caption 0"
    row("29-same-stem", "musubi-tuner#3", "3 of 3 clips", "both take the text of their stem")
