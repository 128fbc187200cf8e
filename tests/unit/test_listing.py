"""Nothing is left out unseen: every file of a source is a clip, a clip's text, a row with its reason, or is counted."""

import io
import os
import tarfile
import unicodedata
from pathlib import Path

import pytest
from clip_files import write_clip
from sentences import refuses, says

from data_prep.shards import write_shards
from sora_train.data.index.folder import open_source
from sora_train.data.index.listing import Listed, Member, list_source
from sora_train.data.index.shards import HowToIndex, index_shards
from sora_train.data.index.walk import plain, walk
from sora_train.errors import UserError
from sora_train.tools.data.command import index_source

NFC = unicodedata.normalize("NFC", "café/Ä")
NFD = unicodedata.normalize("NFD", "café/Ä")
BAD_BYTES = os.fsdecode(b"caf\xe9.mp4")


def files(folder: Path, *names: str, text: str = "a caption") -> Path:
    """Empty clips, and texts, in a folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if path.suffix.lower() == ".txt" else "")
    return folder


def captions(listed: Listed) -> dict[str, str]:
    return {one.key: one.caption for one in listed.members if not one.fault}


def faults(listed: Listed) -> dict[str, Member]:
    return {one.key: one for one in listed.members if one.fault}


def make_tar(path: Path, members: dict[str, bytes], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


# -- folders --------------------------------------------------------------------------------------


def test_linked_folders_are_followed_and_loops_are_told(tmp_path: Path):
    files(tmp_path / "elsewhere", "b.mp4", "b.txt", "deep/c.ts", "deep/c.txt")
    folder = files(tmp_path / "in", "a.mp4", "a.txt")
    os.symlink(tmp_path / "elsewhere", folder / "linked")
    os.symlink(folder, tmp_path / "elsewhere" / "deep" / "back")
    os.symlink("itself.mp4", folder / "itself.mp4")
    os.symlink("nowhere", folder / "gone.mp4")
    listed = list_source(folder, "")
    assert captions(listed).keys() == {"a.mp4", "linked/b.mp4", "linked/deep/c.ts"}
    assert faults(listed).keys() == {"itself.mp4", "gone.mp4"}
    assert listed.left_out == {"link to a folder that holds it (linked/deep/back)": 1}
    assert walk(folder).loops == ["linked/deep/back"]


def test_a_folder_is_listed_in_the_order_of_its_paths(tmp_path: Path):
    names = ["a.mp4", "a/b.mp4", "a-b.mp4", "a/B.mp4", "Ä.mp4", "日本.mp4", "кот.mp4", "a.b/c.mp4"]
    folder = files(tmp_path, *names)
    found = [Path(name) for name in walk(folder).names]
    assert found == sorted(map(Path, names))


def test_texts_of_any_case_and_form_belong_to_their_clip(tmp_path: Path):
    folder = files(tmp_path, "k.mp4", "k.TXT", "кот.MP4", "кот.txt", "v1.0.mp4", "v1.0.Txt")
    files(folder, f"{NFC}.mp4", f"{NFD}.txt", "notes.txt", "README.md", ".DS_Store", "bare")
    listed = list_source(folder, "")
    assert captions(listed) == dict.fromkeys(
        ["k.mp4", "кот.MP4", "v1.0.mp4", f"{NFC}.mp4"], "a caption"
    )
    assert listed.left_out == {".txt": 1, ".md": 1, "hidden": 1, "without extension": 1}
    # Where both forms stand side by side, each clip has its own text.
    files(folder, f"{NFC}.txt", text="composed"), files(folder, f"{NFD}.mp4")
    found = captions(list_source(folder, ""))
    assert (found[f"{NFC}.mp4"], found[f"{NFD}.mp4"]) == ("composed", "a caption")


@pytest.mark.parametrize(
    "written",
    ["sub/a b.mp4", "./sub/a b.mp4", "sub//a b.mp4", "sub\\a b.mp4", "./sub/./a b.mp4", " sub/a b.mp4 ",
     "{root}/sub/a b.mp4"],
)  # fmt: skip
def test_a_table_may_write_a_name_in_any_way(tmp_path: Path, written: str):
    folder = files(tmp_path / "in", "sub/a b.mp4", f"{NFD}.mp4")
    name = written.format(root=folder)
    table = folder / "captions.csv"
    table.write_text(f'file;caption\n"{name}";one\n{NFC}.mp4;two\n')
    assert captions(list_source(folder, "")) == {"sub/a b.mp4": "one", f"{NFD}.mp4": "two"}
    # A table that is the source keeps a name that leads to the file as it is.
    found = list_source(table, "")
    assert list(captions(found).values()) == ["one", "two"]
    assert all((folder / member.shard).is_file() for member in found.members)
    table.write_text(f'file;caption\n"{name}";one\nsub/a b.mp4;two\n')
    with refuses(UserError, "'sub/a b.mp4'", "before"):
        list_source(folder, "")


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("/data/clips/a.mp4", ("absolute", "relative")),
        ("C:\\clips\\a.mp4", ("Windows", "relative")),
        ("s3://bucket/a.mp4", ("addresses", "sora data index")),
        ("x" * 5000 + ".mp4", ("relative",)),
    ],
)
def test_a_name_that_leads_nowhere_is_told_as_what_it_is(
    tmp_path: Path, name: str, facts: tuple[str, ...]
):
    folder = files(tmp_path, "a.mp4")
    (folder / "captions.csv").write_text(f"file,caption\na.mp4,x\n{name},y\n")
    for source in (folder, folder / "captions.csv"):
        with refuses(UserError, "captions.csv", "1 of 2", name, *facts):
            list_source(source, "")


def test_two_tables_are_one_too_many(tmp_path: Path):
    folder = files(tmp_path, "a.mp4")
    for name in ("captions.csv", "captions.tsv", "metadata.csv"):
        (folder / name).write_text("file,caption\na.mp4,x\n")
    with refuses(UserError, "captions.csv", "captions.tsv", "data.captions="):
        list_source(folder, "")
    (folder / "captions.tsv").unlink()
    assert list_source(folder, "").left_out == {".csv": 1}
    (folder / "captions.csv").unlink()
    assert captions(list_source(folder, "")) == {"a.mp4": "x"}
    (folder / "metadata.csv").write_text("key,value\nmade,today\n")
    assert captions(list_source(folder, "")) == {"a.mp4": ""}


def test_what_was_seen_is_used_and_dropped_and_told(tmp_path: Path):
    """Through the command: every name and text that cannot be used is a row with its reason."""
    folder = tmp_path / "in"
    folder.mkdir()
    clip = write_clip(folder / "日本.mp4").read_bytes()
    files(folder, "日本.txt", text="red")
    for name in (BAD_BYTES, "cp1252.mp4", "b.mp4"):
        (folder / name).write_bytes(clip)
    (folder / "cp1252.txt").write_bytes(b"caf\xe9")
    (folder / "captions.jsonl").write_text('{"file": "b.mp4", "caption": NaN}\n{"file": \n')
    (folder / "notes.pdf").touch()
    told = index_source([f"source={folder}", f"work_dir={tmp_path / 'work'}", "workers=1"])
    says(told, "5 clips = 1 usable + 4 dropped", "1 bad_name", "1 bad_caption", "1 no_caption")
    says(told, "1 bad_row", "caf\\xe9.mp4", "cp1252.txt", "offset 3", "NaN", "line 2", "1 .pdf")
    manifest = open_source(str(folder), work_dir=tmp_path / "work")
    assert len(manifest) == 5 and manifest.caption[manifest.drop_reason == ""].tolist() == ["red"]
    shards = write_shards(str(folder), str(tmp_path / "out"), workers=1)
    assert len(shards) == 5 and shards.dropped() == manifest.dropped()


def test_a_source_whose_name_is_no_text_is_refused(tmp_path: Path):
    folder = files(tmp_path / os.fsdecode(b"caf\xe9"), "a.mp4", "a.txt")
    with refuses(UserError, "data.source=", "caf\\xe9", "rename"):
        open_source(str(folder), work_dir=tmp_path)


# -- tars -----------------------------------------------------------------------------------------


def test_previews_in_tars_are_not_the_clip(tmp_path: Path):
    members = {
        "a.gif": b"1",
        "a.mp4": b"22",
        "a.txt": b"x",
        "b.ts": b"3",
        "c.bmp": b"1",
        "c.png": b"2",
    }
    make_tar(tmp_path / "0.tar", members)
    found = {one.key: (one.kind, one.length) for one in list_source(tmp_path, "").members}
    assert found == {"a": ("video", 2), "b": ("video", 1), "c": ("image", 1)}


def test_texts_in_tars_are_text_or_a_reason(tmp_path: Path):
    members = {
        "utf16.mp4": b"1", "utf16.txt": "café\r\nzwei".encode("utf-16"),
        "latin.mp4": b"1", "latin.txt": b"caf\xe9",
        "half.mp4": b"1", "half.json": b'{"caption": "a \\ud83d"}',
        "score.mp4": b"1", "score.json": b'{"caption": "a", "scores": {"\\ud83d": 1}}',
        "broken.mp4": b"1", "broken.json": b'{"caption": ',
        "deep.mp4": b"1", "deep.json": b"[" * 5000,
        "number.mp4": b"1", "number.json": b'{"caption": 3}',
        "gone.mp4": b"1",
    }  # fmt: skip
    make_tar(tmp_path / "in" / "0.tar", members)
    listed = list_source(tmp_path / "in", "")
    assert captions(listed) == {"utf16": "café\nzwei", "number": "", "gone": ""}
    told = {key: one.fault for key, one in faults(listed).items()}
    says(told["latin"], "latin.txt", "0xe9", "offset 3")
    says(told["half"], "U+D83D"), says(told["score"], "U+D83D")
    says(told["broken"], "broken.json", "not JSON")
    says(told["deep"], "deep.json", "not JSON")
    (number,) = [one for one in listed.members if one.key == "number"]
    says(number.lacks, "json", "a number: 3")
    how = HowToIndex(probe="header")
    manifest = index_shards(str(tmp_path / "in" / "0.tar"), tmp_path / "out", how, workers=1)
    assert manifest is not None
    assert manifest.dropped() == {"bad_caption": 5, "unreadable": 3}


def test_names_in_tars_that_are_no_text(tmp_path: Path):
    clip = write_clip(tmp_path / "clip.mp4").read_bytes()
    members = {BAD_BYTES: clip, os.fsdecode(b"caf\xe9.txt"): b"x", "кот.mp4": clip, "кот.txt": b"y"}
    make_tar(tmp_path / "in" / "0.tar", members, format=tarfile.GNU_FORMAT)
    make_tar(tmp_path / "in" / "1.tar", {f"1{name}": data for name, data in members.items()})
    manifest = index_shards(str(tmp_path / "in"), tmp_path / "out", HowToIndex(), workers=1)
    assert manifest is not None and manifest.dropped() == {"bad_name": 2}
    assert manifest.key.tolist() == ["caf\\xe9", "кот", "1caf\\xe9", "1кот"]


def test_a_sparse_clip_in_a_tar_is_no_range_of_bytes(tmp_path: Path):
    holey = tmp_path / "a.mp4"
    with holey.open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    (tmp_path / "b.mp4").write_bytes(b"whole")
    made = os.system(f"cd {tmp_path} && mkdir in && tar -S -cf in/0.tar a.mp4 b.mp4")
    assert made == 0
    first, second = list_source(tmp_path / "in", "").members
    says(first.fault, "a.mp4", "sparse", "-S")
    assert second.key == "b" and not second.fault


def test_links_and_what_occurs_twice_in_a_tar_are_told(tmp_path: Path):
    folder = files(tmp_path / "made", "a.mp4", "a.gif", "b.mp4", "c.mp4", "c.txt", text="x")
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (folder / name).write_bytes(name.encode())
    os.link(folder / "a.mp4", folder / "hard.mp4")
    os.symlink("a.mp4", folder / "soft.mp4")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.mp4", "a.gif", "a.gif", "hard.mp4", "soft.mp4", "c.mp4", "c.txt", "c.txt"):
            tar.add(folder / name, name)
        for name, text in (("d.txt", b"no clip"), ("bare", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    make_tar(tmp_path / "in" / "1.tar", {"z.mp4": b"1"})
    os.rename(tmp_path / "0.tar", tmp_path / "in" / "0.tar")
    listed = list_source(tmp_path / "in", "")
    assert captions(listed).keys() == {"a", "z"} and listed.left_out == {"key without a clip": 1}
    told = {key: one.fault for key, one in faults(listed).items()}
    says(told["hard"], "hard.mp4", "link", "a.mp4", "--hard-dereference")
    says(told["soft"], "soft.mp4", "link", "a.mp4", "--dereference")
    says(told["c"], "c.txt", "before")


def test_a_damaged_tar_is_a_row_of_its_own(tmp_path: Path):
    path = make_tar(tmp_path / "0.tar", {"a.mp4": b"1", "b.mp4": b"2", "c.mp4": b"3"})
    data = bytearray(path.read_bytes())
    data[1024] ^= 1  # the header of b.mp4
    path.write_bytes(data)
    listed = list_source(tmp_path, "")
    assert captions(listed).keys() == {"a"}
    ((key, member),) = faults(listed).items()
    assert (key, member.reason) == ("", "shard_damaged")
    says(member.fault, "0.tar", "byte 1024")


def test_a_table_of_tars_that_names_what_no_shard_holds(tmp_path: Path):
    folder = tmp_path / "in"
    make_tar(folder / "0.tar", {"./sub/a.mp4": b"1", "b.mp4": b"1", "c.mp4": b"1", "c.txt": b"own"})
    rows = "file,caption\nsub\\a.mp4,one\nb,two\nd.mp4,three\nc.mp4,\n"
    (folder / "captions.csv").write_text(rows)
    listed = list_source(folder, "")
    assert captions(listed) == {"./sub/a": "one", "b": "two", "c": "own"}
    ((name, member),) = faults(listed).items()
    assert name == "d.mp4" and member.reason == "missing_clip"


def test_shards_and_loose_clips_are_refused_with_an_output_too(tmp_path: Path):
    make_tar(files(tmp_path / "in", "b.wmv") / "0.tar", {"a.mp4": b"1"})
    with refuses(UserError, "b.wmv", "0.tar"):
        index_shards(str(tmp_path / "in"), tmp_path / "out", HowToIndex())


def test_plain_names(tmp_path: Path):
    assert plain("../a.mp4") == "../a.mp4" and plain("https://h//a") == "https://h//a"
    assert plain(f"{tmp_path}/x/a.mp4", tmp_path) == "x/a.mp4"
