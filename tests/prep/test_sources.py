"""What an input may be: each form lists every source once, with what is said of it, and what is wrong with it."""

import io
import json
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from sentences import refuses

from data_prep.sources.listing import list_sources
from sora_train.data.decode.frames import BadClip, open_container
from sora_train.data.decode.video_io import encode_h264
from sora_train.errors import UserError


@pytest.fixture
def footage(tmp_path: Path) -> Path:
    folder = tmp_path / "footage"
    (folder / "day 1").mkdir(parents=True)
    for name in ("b.mp4", "a.mov", "day 1/c.mkv", "poster.png"):
        (folder / name).write_bytes(b"x" * (10 + len(name)))
    (folder / "notes.pdf").write_bytes(b"no footage")
    (folder / "b.txt").write_text("a boat")
    return folder


def test_a_folder_lists_its_footage_in_order_with_captions(footage: Path):
    sources = list_sources(str(footage))
    assert [one.key for one in sources] == ["a.mov", "b.mp4", "day 1/c.mkv", "poster.png"]
    assert [one.kind for one in sources] == ["video", "video", "video", "image"]
    assert [one.given_caption for one in sources] == ["", "a boat", "", ""]
    assert [one.length for one in sources] == [15, 15, 21, 20]


def test_what_a_folders_table_says_goes_with_its_files(footage: Path):
    row = {"file": "./day 1/c.mkv", "caption": "a sea", "licence": "CC-BY", "camera": "X100"}
    (footage / "captions.jsonl").write_text(json.dumps(row))
    found = {one.key: one for one in list_sources(str(footage))}
    sea = found["day 1/c.mkv"]
    assert (sea.given_caption, sea.licence, sea.provenance) == (
        "a sea",
        "CC-BY",
        '{"camera": "X100"}',
    )
    assert found["b.mp4"].licence == "" and found["b.mp4"].given_caption == "a boat"


def test_stamp_changes_with_the_bytes(footage: Path):
    before = list_sources(str(footage))
    (footage / "b.mp4").write_bytes(b"y" * before[1].length)
    after = list_sources(str(footage))
    assert [a.stamp == b.stamp for a, b in zip(before, after, strict=True)] == [
        True,
        False,
        True,
        True,
    ]


def test_a_link_out_of_the_folder_is_not_followed(footage: Path, tmp_path: Path):
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (footage / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (footage / "inside.mp4").symlink_to(footage / "b.mp4")
    found = {one.key: one for one in list_sources(str(footage))}
    assert found["link.mp4"].drop_reason == "link_outside" and not found["link.mp4"].path
    assert not found["inside.mp4"].drop_reason
    followed = {one.key: one for one in list_sources(str(footage), follow_links=True)}
    assert followed["link.mp4"].path == str(tmp_path / "secret.mp4")


def test_glob_list_and_single_file(footage: Path, tmp_path: Path):
    assert [Path(one.key).name for one in list_sources(f"{footage}/*.m*")] == ["a.mov", "b.mp4"]
    names = tmp_path / "names.txt"
    names.write_text("# mine\nfootage/b.mp4\nfootage/gone.mp4\n")
    assert [(one.key, one.drop_reason) for one in list_sources(str(names))] == [
        ("footage/b.mp4", ""),
        ("footage/gone.mp4", "missing"),
    ]
    assert [one.key for one in list_sources(str(footage / "b.mp4"))] == ["b.mp4"]


def test_a_table_brings_captions_licences_ranges_and_provenance(footage: Path):
    rows = [
        {"file": "b.mp4", "caption": "one", "license": "CC0", "begin": 1, "end": "2.5", "url": "u"},
        {"file": "b.mp4", "caption": "two", "begin": 4, "end": 3},
        {"file": "a.mov", "caption": "three", "start": "soon"},
        {"caption": "nothing"},
    ]
    table = footage / "table.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    first, second, third, fourth = list_sources(str(table))
    assert (first.given_caption, first.licence, first.range_begin, first.range_end) == (
        "one",
        "CC0",
        1.0,
        2.5,
    )
    assert json.loads(first.provenance) == {"url": "u"} and first.key == "b.mp4@1-2.5"
    assert second.drop_reason == third.drop_reason == fourth.drop_reason == "bad_row"
    assert "4 to 3" in second.drop_detail and "soon" in third.drop_detail


def test_a_source_that_is_named_twice_is_refused(footage: Path):
    table = footage / "table.csv"
    table.write_text("file,caption\nb.mp4,x\nb.mp4,y\n")
    with refuses(UserError, "b.mp4", "twice", "begin"):
        list_sources(str(table))


def test_names_in_a_tar_are_never_paths(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../../evil.mp4", "/etc/also.mp4", "fine.mp4"):
            info = tarfile.TarInfo(name)
            info.size = 7
            tar.addfile(info, io.BytesIO(b"footage"))
    sources = list_sources(str(tmp_path / "a.tar"))
    assert {one.path for one in sources} == {str(tmp_path / "a.tar")}
    assert all(one.offset > 0 and one.length == 7 for one in sources)


def test_output_of_a_curator(tmp_path: Path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "metas" / "v0").mkdir(parents=True)
    (tmp_path / "clips" / "id1.mp4").write_bytes(b"clip")
    (tmp_path / "clips" / "id2.mp4").write_bytes(b"clip")
    meta = {
        "span_uuid": "id1", "source_video": "s3://films/a.mp4", "duration_span": [2.5, 7.5], "aesthetic_score": 5.5,
        "motion_score": {"global_mean": 0.01, "per_patch_min_256": 0.0},
        "windows": [
            {"start_frame": 0, "end_frame": 120, "qwen_caption": "A dog.", "qwen_lm_enhanced_caption": "A brown dog."},
            {"start_frame": 120, "end_frame": 240, "qwen_caption": "It runs.", "qwen_lm_enhanced_caption": "It ran."},
        ],
    }  # fmt: skip
    (tmp_path / "metas" / "v0" / "id1.json").write_text(json.dumps(meta))
    first, second = list_sources(str(tmp_path))
    assert first.key == "clips/id1.mp4" and first.given_caption == "A brown dog. It ran."
    assert json.loads(first.given_captions) == {"qwen": "A dog. It runs."}
    assert json.loads(first.provenance) == {
        "curated_source": "s3://films/a.mp4", "curated_span": "2.5-7.5", "curated_aesthetic": "5.5",
        "curated_motion": "0.01",
    }  # fmt: skip
    assert second.given_caption == "" and not second.drop_reason


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nowhere", ("input=nowhere", "does not exist")),
        ("empty", ("input=", "holds no clips")),
        ("thing.xyz", ("neither a video nor a list",)),
        ("nowhere*.mp4", ("holds no footage",)),
    ],
)
def test_an_input_that_is_none(tmp_path: Path, monkeypatch, given: str, words: tuple[str, ...]):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("thing.xyz").write_text("x")
    with refuses(UserError, *words):
        list_sources(given)


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile 'real.mp4'\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10.0,\nhttp://127.0.0.1:9/real.ts\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period/></MPD>',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
}


@pytest.mark.parametrize("form", PLAYLISTS)
def test_a_playlist_is_no_footage(tmp_path: Path, monkeypatch, form: str):
    # FFmpeg would open what it names: a file beside the working directory, or a server.
    monkeypatch.chdir(tmp_path)
    encode_h264(np.zeros((4, 32, 32, 3), np.uint8), 8, tmp_path / "real.mp4")
    (tmp_path / "film.mp4").write_text(PLAYLISTS[form])
    with open("film.mp4", "rb") as file, pytest.raises((BadClip, av.error.FFmpegError)):
        open_container(file)
