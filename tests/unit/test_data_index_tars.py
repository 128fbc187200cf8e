"""Indexing shards made elsewhere: every sample gets a row or a reason, wherever the tar lies and however it is cut."""

import functools
import http.server
import io
import json
import os
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from clip_files import inflate, numbered, write_clip, write_timed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sentences import refuses

from sora_train.data.decode.frames import BadClip, DecodeRequest, decode_frames
from sora_train.data.decode.probe import ProbeRequest, probe_video
from sora_train.data.index import folder as folder_module
from sora_train.data.index.folder import open_source
from sora_train.data.index.shards import PARTS_FOLDER, HowToIndex, index_shards
from sora_train.data.index.tars import MemberKeys, caption_of, split_name
from sora_train.data.manifest import COLUMNS, FILE_NAME, Manifest
from sora_train.data.storage import remote
from sora_train.data.storage.ranges import StorageFault
from sora_train.data.storage.remote import RemoteRange, expand
from sora_train.errors import Fault, UserError
from sora_train.tools.data.command import index_source

Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4").read_bytes()


def make_tar(path: Path, members: Members, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def plain(key: str, clip: bytes) -> Members:
    return [(f"{key}.mp4", clip), (f"{key}.txt", f"caption of {key}".encode())]


def indexed(source: object, output: Path, **options: object) -> Manifest:
    how = options.pop("how", HowToIndex(probe="header"))
    # Most of the time goes into starting processes; the test of the command has two of them.
    found = index_shards(str(source), output, how, **{"workers": 1, **options})
    assert found is not None
    return found


def reasons(manifest: Manifest) -> dict[str, str]:
    return dict(zip(manifest.key.tolist(), manifest.drop_reason.tolist(), strict=True))


# -- names ----------------------------------------------------------------------------------------


def test_braces_and_wildcards(tmp_path: Path):
    assert expand("s-{008..011}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]
    assert expand("s-{9..10}.tar") == ["s-9.tar", "s-10.tar"]
    assert expand("s3://b/{x,y}/{0..1}.tar") == [f"s3://b/{d}/{n}.tar" for d in "xy" for n in "01"]
    for name in ("b.tar", "a.tar"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/*.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    for bad, words in {
        "s-{3..1}.tar": "runs backwards; write {1..3}",
        "s-{x}.tar": "neither a range",
        f"{tmp_path}/no*.tar": "matches no file",
    }.items():
        with pytest.raises(UserError, match=re.escape(words)):
            expand(bad)


@settings(deadline=None)
@given(st.text("ab./_", min_size=1, max_size=12))
def test_keys_are_webdatasets(name: str):
    key, extension = pytest.importorskip("webdataset.tariterators").base_plus_ext(name)
    mine = split_name(name)
    assert mine == ((key, extension) if key and not key.endswith("/") else ("", ""))


def test_captions_as_the_user_names_them():
    texts = {"json": json.dumps({"caption": {"long": " deep "}, "text": "flat"}), "txt": "plain"}
    assert caption_of(texts, ["json:caption.long", "txt"]) == "deep"
    assert caption_of(texts, ["json:caption.short", "txt"]) == "plain"
    assert caption_of(texts, ["json"]) == "flat"
    assert caption_of({"json": "{broken", "txt": "plain"}, ["json:a", "txt"]) == "plain"
    assert caption_of({"meta.json": '{"a": "x"}'}, ["meta.json:a"]) == "x"
    assert caption_of(texts, ["short.txt"]) == ""


# -- what a shard holds ---------------------------------------------------------------------------


def test_members_and_dotted_extensions(tmp_path: Path, clip: bytes):
    picture = io.BytesIO()
    Image.fromarray(numbered(1)[0]).save(picture, "png")
    said = json.dumps({"caption": {"long": "long one"}}).encode()
    make_tar(
        tmp_path / "in" / "0.tar",
        [
            ("v1.0/a.left.mp4", clip),
            ("v1.0/a.right.mp4", clip),
            ("v1.0/a.meta.json", said),
            ("v1.0/b.right.mp4", clip),
            ("v1.0/b.txt", b"short one"),
            ("v1.0/c.thumb.jpg", b"no clip"),
            ("v1.0/c.txt", b"alone"),
        ],
    )
    how = HowToIndex(MemberKeys(("right.mp4",), ("meta.json:caption.long", "txt")), "decode")
    manifest = indexed(tmp_path / "in", tmp_path / "out", how=how)
    assert manifest.key.tolist() == ["v1.0/a", "v1.0/b", "v1.0/c"]
    assert manifest.caption.tolist() == ["long one", "short one", "alone"]
    assert manifest.drop_reason.tolist() == ["", "", "missing_clip"]
    assert manifest.frames.tolist() == [9, 9, 0] and not manifest.unverified.any()
    for row in range(2):
        data = Path(manifest.path(row)).read_bytes()
        assert data[manifest.offset[row] :][: manifest.length[row]] == clip
    # Without a word from the user two clips of a sample are no clip.
    any_clip = indexed(tmp_path / "in", tmp_path / "any", how=HowToIndex(probe="header"))
    assert reasons(any_clip)["v1.0/a"] == "ambiguous_clip"
    assert "video_key=" in any_clip.drop_detail[0]
    make_tar(tmp_path / "p" / "0.tar", [("i.png", picture.getvalue()), ("i.txt", b"grey")])
    pictures = indexed(tmp_path / "p", tmp_path / "pictures")
    assert pictures.kind.tolist() == ["image"] and pictures.width.tolist() == [48]


def test_every_flaw_has_its_reason(tmp_path: Path, clip: bytes):
    folder = tmp_path / "in"
    make_tar(
        folder / "0.tar",
        [
            *plain("good", clip),
            ("only.txt", b"text"),
            ("empty.mp4", b""),
            ("empty.txt", b"text"),
            ("mute.mp4", clip),
            ("blank.mp4", clip),
            ("blank.txt", b" \n"),
            ("broken.mp4", b"junk" * 300),
            ("broken.txt", b"text"),
            ("poster.jpg", b"poster"),
            *plain("poster", clip),
        ],
    )
    whole = make_tar(folder / "1.tar", [*plain("first", clip), *plain("cut", clip)]).read_bytes()
    (folder / "1.tar").write_bytes(whole[: whole.index(clip, whole.index(b"cut.mp4")) + 99])
    damaged = bytearray(
        make_tar(folder / "2.tar", [*plain("kept", clip), *plain("lost", clip)]).read_bytes()
    )
    damaged[damaged.index(b"lost.mp4") + 150] ^= 0xFF
    (folder / "2.tar").write_bytes(damaged)
    unmarked = make_tar(folder / "3.tar", plain("last", clip)).read_bytes()
    (folder / "3.tar").write_bytes(unmarked.rstrip(b"\0")[:-1] + b"f" + b"\0" * 200)
    (folder / "4.tar").write_bytes(b"")
    (folder / "5.tar").write_bytes(b"<html>not found</html>" * 99)
    manifest = indexed(folder, tmp_path / "out")
    assert manifest.dropped() == {
        "missing_clip": 1, "empty_member": 1, "no_caption": 2, "unreadable": 1, "shard_cut": 2,
        "shard_damaged": 1, "empty_shard": 1, "not_a_tar": 1,
    }  # fmt: skip
    found = reasons(manifest)
    assert [key for key, reason in found.items() if not reason] == [
        "good",
        "poster",
        "first",
        "kept",
        "last",
    ]
    assert found["cut"] == "shard_cut" and found["mute"] == found["blank"] == "no_caption"
    assert all(manifest.drop_detail[manifest.drop_reason != ""].tolist())
    assert "byte" in manifest.drop_detail[manifest.drop_reason == "shard_damaged"][0]


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".tar.zst"])
def test_compressed_tars_are_refused(tmp_path: Path, clip: bytes, suffix: str):
    make_tar(tmp_path / f"0{suffix}", plain("a", clip), "w:gz")
    for source in (tmp_path, tmp_path / f"0{suffix}"):
        with refuses(UserError, f"0{suffix}", "compressed", "gunzip"):
            indexed(source, tmp_path / "out")
    os.rename(tmp_path / f"0{suffix}", tmp_path / "0.tar")
    with refuses(UserError, "compressed", "gzip"):
        indexed(tmp_path, tmp_path / "out")


def test_a_webdataset_shard_is_read_as_webdataset_reads_it(tmp_path: Path, clip: bytes):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.ShardWriter(f"{tmp_path}/s-%03d.tar", maxcount=2, verbose=0) as sink:
        for number in range(5):
            sink.write(
                {"__key__": f"d/{number:04d}", "mp4": clip, "json": {"caption": f"clip {number}"}}
            )
    manifest = indexed(f"{tmp_path}/s-{{000..002}}.tar", tmp_path / "out")
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    read = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert manifest.key.tolist() == [sample["__key__"] for sample in read]
    assert manifest.caption.tolist() == [json.loads(sample["json"])["caption"] for sample in read]
    assert manifest.shard.tolist() == [Path(sample["__url__"]).name for sample in read]


def test_mistakes_in_member_names_tell_what_is_there(tmp_path: Path, clip: bytes):
    make_tar(tmp_path / "0.tar", [("a.mp4", clip), ("a.cap", b"x")])
    with refuses(UserError, "caption", "cap (1)", "caption_keys="):
        indexed(tmp_path, tmp_path / "out")
    with refuses(UserError, "video_key=webm", "mp4 (1)"):
        indexed(tmp_path, tmp_path / "out", how=HowToIndex(MemberKeys(("webm",))))
    with refuses(UserError, "2 shards", "1 do not exist", "1.tar"):
        indexed(f"{tmp_path}/{{0,1}}.tar", tmp_path / "out")


# -- duplicate keys -------------------------------------------------------------------------------


def test_duplicate_keys(tmp_path: Path, clip: bytes):
    folder = tmp_path / "in"
    make_tar(folder / "0.tar", [*plain("a", clip), *plain("b", clip)])
    make_tar(folder / "1.tar", [*plain("c", clip), *plain("a", clip)])
    with refuses(UserError, "'a'", "0.tar", "1.tar", "per_shard"):
        indexed(folder, tmp_path / "out")
    assert indexed(folder, tmp_path / "own", duplicate_keys="per_shard").dropped() == {}
    dropped = indexed(folder, tmp_path / "drop", duplicate_keys="drop")
    assert dropped.drop_reason.tolist() == ["", "", "", "duplicate_key"]
    make_tar(folder / "1.tar", [*plain("c", clip), *plain("c", clip)])
    with refuses(UserError, "'c'", "1.tar"):
        indexed(folder, tmp_path / "out")
    counted = indexed(folder, tmp_path / "inside", duplicate_keys="per_shard")
    assert counted.dropped() == {"duplicate_key": 1} and len(counted) == 4


# -- probes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_header_is_believed_and_marked(tmp_path: Path, suffix: str):
    path = tmp_path / f"clip.{suffix}"
    if suffix == "mp4":
        write_clip(path)
    else:
        write_timed(path, [40 * n for n in range(9)])
    request = ProbeRequest(0, "k", str(path), 0, path.stat().st_size, "video", "decode")
    seen = probe_video(request)
    told = probe_video(ProbeRequest(**{**vars(request), "count": "header"}))
    for name in ("codec", "height", "width", "rotation", "start", "frames"):
        assert getattr(told, name) == getattr(seen, name), name
    assert told.fps == pytest.approx(seen.fps) and told.digest != seen.digest


def test_unverified_rows(tmp_path: Path, clip: bytes):
    make_tar(tmp_path / "0.tar", plain("a", clip))
    told = indexed(tmp_path, tmp_path / "h", how=HowToIndex(probe="header"))
    seen = indexed(tmp_path, tmp_path / "d", how=HowToIndex(probe="decode"))
    assert told.unverified.tolist() == [True] and seen.unverified.tolist() == [False]
    again = Manifest.load(tmp_path / "h" / FILE_NAME)
    assert again.unverified.tolist() == [True]
    assert again.with_columns(unverified=np.array([False])).digest() == again.digest()


def test_a_header_that_promises_too_much_is_found_at_the_first_decode(tmp_path: Path, clip: bytes):
    inflated = inflate(clip)
    make_tar(tmp_path / "0.tar", plain("a", inflated))
    manifest = indexed(tmp_path, tmp_path / "out")
    assert manifest.frames.tolist() == [90] and manifest.unverified.tolist() == [True]
    times = (0.0, 5.0)
    assert times[-1] < manifest.duration[0]
    request = DecodeRequest(
        0,
        "a",
        manifest.path(0),
        int(manifest.offset[0]),
        int(manifest.length[0]),
        "video",
        times,
        (0, 0, 32, 48),
        (32, 48),
        32,
        48,
    )
    with pytest.raises(BadClip, match="too_few_frames"):
        decode_frames(request)


def test_a_clip_that_hangs_its_decoder_costs_that_clip_only(
    tmp_path: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SORA_TEST_DECODE", "spin=bad")
    monkeypatch.setattr(folder_module, "PROBE_SECONDS_PER_MIB", 0.0)
    make_tar(tmp_path / "0.tar", [*plain("a", clip), *plain("bad", clip), *plain("c", clip)])
    manifest = indexed(tmp_path, tmp_path / "out", how=HowToIndex(probe="header", timeout=2.0))
    assert manifest.drop_reason.tolist() == ["", "decode_timeout", ""]


# -- going on, parts, versions --------------------------------------------------------------------


def test_what_was_found_is_not_looked_at_again(
    tmp_path: Path, clip: bytes, monkeypatch: pytest.MonkeyPatch
):
    folder, out = tmp_path / "in", tmp_path / "out"
    for number in range(3):
        make_tar(folder / f"{number}.tar", [*plain(f"a{number}", clip), *plain(f"b{number}", clip)])

    def stop_after(done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        indexed(folder, out, progress=stop_after)
    assert not (out / FILE_NAME).exists()
    assert len(list((out / PARTS_FOLDER).iterdir())) == 2, "the whole shards are kept"
    seen: list[tuple[int, int]] = []
    manifest = indexed(folder, out, progress=lambda *count: seen.append(count))
    assert seen == [(1, 2), (2, 2)], "only the third shard was left"
    assert not (out / PARTS_FOLDER).exists()
    assert manifest.digest() == indexed(folder, tmp_path / "at_once").digest()


def test_parts_and_merge(tmp_path: Path, clip: bytes):
    folder, out = tmp_path / "in", tmp_path / "out"
    for number in range(5):
        make_tar(folder / f"{number}.tar", plain(f"a{number}", clip))
    how = HowToIndex(probe="header")
    assert index_shards(str(folder), out, how, part="2/2") is None
    with refuses(UserError, "3 of 5", "0.tar"):
        indexed(folder, out, merge=True)
    assert index_shards(str(folder), out, how, part="1/2") is None
    merged = indexed(folder, out, merge=True)
    assert merged.key.tolist() == [f"a{number}" for number in range(5)]
    assert merged.digest() == indexed(folder, tmp_path / "at_once").digest()


def test_new_shards_follow_the_old_rows(tmp_path: Path, clip: bytes):
    folder, out = tmp_path / "in", tmp_path / "out"
    make_tar(folder / "1.tar", plain("one", clip))
    first = indexed(folder, out)
    make_tar(folder / "0.tar", plain("zero", clip))
    second = indexed(folder, out)
    assert second.key.tolist() == ["one", "zero"] and second.revision == 2
    for name in COLUMNS:
        assert (getattr(second, name)[:1] == getattr(first, name)).all(), name
    assert Manifest.load(out / "manifest.1.parquet").digest() == first.digest()
    stamp = (out / FILE_NAME).stat().st_mtime_ns
    assert indexed(folder, out).digest() == second.digest()
    assert (out / FILE_NAME).stat().st_mtime_ns == stamp, "nothing new, nothing written"
    make_tar(folder / "2.tar", plain("one", clip))
    with refuses(UserError, "'one'", "1.tar", "2.tar"):
        indexed(folder, out)


def test_a_shard_that_changed_is_told_before_anything(tmp_path: Path, clip: bytes):
    folder, out = tmp_path / "in", tmp_path / "out"
    shard = make_tar(folder / "0.tar", plain("a", clip))
    indexed(folder, out)
    assert open_source(str(out), work_dir=tmp_path / "w").path(0) == str(shard)
    assert len(open_source(str(out / FILE_NAME), work_dir=tmp_path / "w")) == 1
    for change in (shard.read_bytes().replace(b"caption of a", b"caption of z"), b"longer"):
        data = shard.read_bytes()
        if change == b"longer":
            with shard.open("ab") as file:
                file.write(b"\0" * 512)
        else:
            # Of equal size: another header at its front.
            shard.write_bytes(data.replace(b"a.mp4", b"z.mp4"))
        with refuses(UserError, "changed", "index again"):
            open_source(str(out), work_dir=tmp_path / "w")
        with refuses(UserError, "changed", "new name"):
            indexed(folder, out)
        shard.write_bytes(data)
    shard.unlink()
    with refuses(UserError, "missing", "restore"):
        open_source(str(out), work_dir=tmp_path / "w")


def test_the_command(tmp_path: Path, clip: bytes):
    make_tar(
        tmp_path / "in" / "00.tar", [("a.mp4", clip), ("a.json", b'{"caption": {"long": "x"}}')]
    )
    make_tar(tmp_path / "in" / "01.tar", plain("b", clip))
    said = index_source(
        [
            f"source={tmp_path}/in/{{00..01}}.tar",
            f"output={tmp_path}/out",
            "probe=packets",
            "caption_keys=[json:caption.long,txt]",
            "video_key=mp4",
        ]  # fmt: skip
    )
    assert "2 clips = 2 usable + 0 dropped" in said and f"data.source={tmp_path}/out" in said
    assert Manifest.load(tmp_path / "out" / FILE_NAME).caption.tolist() == ["x", "caption of b"]
    with pytest.raises(UserError, match="part=3/2 is not i/N"):
        index_source([f"source={tmp_path}/in/00.tar", "part=3/2"])
    with refuses(UserError, "sora data index"):
        open_source("s3://bucket/{0..3}.tar", work_dir=tmp_path)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    real = remote.importlib.import_module

    def without(name: str) -> object:
        if name in ("s3fs", "gcsfs", "aiohttp"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(remote.importlib, "import_module", without)
    remote._of_scheme.cache_clear()
    for url, package, extra in (("s3://b/0.tar", "s3fs", "s3"), ("gs://b/0.tar", "gcsfs", "gs"),
                                ("https://h/0.tar", "aiohttp", "http")):  # fmt: skip
        with pytest.raises(UserError, match=rf"{package}.*sora_train\[{extra}\]"):
            remote.filesystem(url)
    remote._of_scheme.cache_clear()


# -- a server -------------------------------------------------------------------------------------


class Server(http.server.SimpleHTTPRequestHandler):
    """Files with byte ranges, and the ills of a server by the first folder of the path."""

    tries: dict[str, int] = {}
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        ill, _, name = self.path.lstrip("/").partition("/")
        path = Path(self.directory) / name
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        place = f"{self.path} {wanted and wanted[0]}"
        self.tries[place] = self.tries.get(place, 0) + 1
        if not path.is_file():
            return self._reply(404, b"")
        if ill == "down" or (ill == "busy" and self.tries[place] < 2):
            return self._reply(503, b"")
        if ill == "stall" and self.tries[place] < 2:
            time.sleep(1.0)
        data = path.read_bytes()
        if not wanted or ill == "whole":
            return self._reply(200, data)
        first = int(wanted[1])
        last = min(int(wanted[2] or len(data)), len(data) - 1)
        self._reply(206, data[first : last + 1], f"bytes {first}-{last}/{len(data)}",
                    half=ill == "half" and self.tries[place] < 2)  # fmt: skip
        return None

    def do_HEAD(self) -> None:
        name = self.path.lstrip("/").partition("/")[2]
        path = Path(self.directory) / name
        size = path.stat().st_size if path.is_file() else 0
        self._reply(200 if path.is_file() else 404, b"", length=size)

    def _reply(
        self, status: int, body: bytes, span: str = "", *, length: int = 0, half: bool = False
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(body)))
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        try:
            self.wfile.write(body[: len(body) // 2] if half else body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if half:
            self.close_connection = True


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, clip: bytes) -> Iterator[tuple[str, Path]]:
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    folder = tmp_path_factory.mktemp("served")
    for number in range(2):
        make_tar(folder / f"{number}.tar", [*plain(f"a{number}", clip), *plain(f"b{number}", clip)])
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Server, directory=str(folder))
    )
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    server.server_close()


def test_remote_shards_are_indexed_as_local_ones(tmp_path: Path, served: tuple[str, Path]):
    url, folder = served
    for probe in ("header", "decode"):
        how = HowToIndex(probe=probe)
        far = indexed(f"{url}/well/{{0..1}}.tar", tmp_path / f"far-{probe}", how=how)
        near = indexed(folder, tmp_path / f"near-{probe}", how=how)
        for name in COLUMNS.keys() - {"shard"}:
            assert (getattr(far, name) == getattr(near, name)).all(), name
        assert far.path(0) == f"{url}/well/0.tar" and far.dropped() == {}
    again = Manifest.load(tmp_path / "far-decode" / FILE_NAME)
    assert again.path(3) == f"{url}/well/1.tar"
    open_source(str(tmp_path / "far-decode"), work_dir=tmp_path / "w")


@pytest.mark.parametrize("ill", ["busy", "half"])
def test_what_passes_is_retried(tmp_path: Path, served: tuple[str, Path], ill: str):
    found = indexed(f"{served[0]}/{ill}/0.tar", tmp_path)
    assert found.key.tolist() == ["a0", "b0"] and found.dropped() == {}


def test_what_does_not_pass_is_a_fault_of_storage(
    tmp_path: Path, served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
):
    url, _ = served
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    with refuses(Fault, "down/0.tar", "4 attempts"):
        indexed(f"{url}/down/0.tar", tmp_path / "down")
    with refuses(Fault, "whole file", "byte range"):
        indexed(f"{url}/whole/0.tar", tmp_path / "whole")
    with refuses(UserError, "1 shards", "1 do not exist", "gone.tar"):
        indexed(f"{url}/well/gone.tar", tmp_path / "gone")


def test_a_stalled_read_is_tried_again(served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch):
    url, folder = served
    monkeypatch.setattr(remote, "STALLED_SECONDS", 0.3)
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.01)
    remote._of_scheme.cache_clear()
    with RemoteRange(f"{url}/stall/0.tar", 512, 100) as file:
        assert file.read(50) == (folder / "0.tar").read_bytes()[512:562]
        assert file.fault == ""
    remote._of_scheme.cache_clear()
    with pytest.raises(StorageFault, match="does not exist"):
        remote.read_range(f"{url}/well/gone.tar", 0, 10)
