"""The store of files: whole or not there, wherever it lies."""

import errno
from pathlib import Path

import fsspec
import pytest
from sentences import refuses

from sora_train.errors import Fault
from sora_train.serving.jobs.files import FileStore


@pytest.fixture(params=["folder", "memory", "file"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> FileStore:
    where = {
        "folder": str(tmp_path / "store"),
        "memory": f"memory://{tmp_path.name}",
        "file": f"file://{tmp_path}/store",
    }
    return FileStore(where[request.param])


def put(files: FileStore, tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / "source").write_bytes(data)
    files.put(name, tmp_path / "source")


def test_files_come_back_and_go(files: FileStore, tmp_path: Path) -> None:
    put(files, tmp_path, "outputs/a/1/video.mp4", b"one")
    put(files, tmp_path, "outputs/a/1/video.mp4", b"two!")
    put(files, tmp_path, "outputs/a/2/video.mp4", b"three")
    put(files, tmp_path, "outputs/b/video.mp4", b"four")
    assert files.names("outputs/a") == ["outputs/a/1/video.mp4", "outputs/a/2/video.mp4"]
    files.get("outputs/a/1/video.mp4", tmp_path / "deep/target")
    assert (tmp_path / "deep/target").read_bytes() == b"two!"
    with files.open("outputs/a/2/video.mp4") as file:
        file.seek(2)
        assert file.read(2) == b"re"
    assert files.size("outputs/a/1/video.mp4") == 4 and files.size("outputs/a/3/x") is None
    files.remove("outputs/a")
    files.remove("outputs/a")
    assert files.names("outputs/a") == [] and files.names("outputs") == ["outputs/b/video.mp4"]
    for missing in (lambda: files.open("outputs/a/x"), lambda: files.get("a", tmp_path / "t")):
        with pytest.raises(FileNotFoundError):
            missing()
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "name", ["", "../x", "a/../../x", "/etc/passwd", "a//b", "a/.hidden", "a\\b", "a\0", "a/", "é"]
)
def test_no_name_leads_out_of_the_store(files: FileStore, tmp_path: Path, name: str) -> None:
    (tmp_path / "source").write_bytes(b"x")
    for call in (
        lambda: files.put(name, tmp_path / "source"),
        lambda: files.get(name, tmp_path / "t"),
        lambda: files.remove(name),
        lambda: files.open(name),
        lambda: files.size(name),
        lambda: files.names(name),
    ):
        with pytest.raises(ValueError, match="no name"):
            call()


def test_a_failed_upload_leaves_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its own, nor that of the half that had been written."""
    files = FileStore(f"file://{tmp_path}/store")
    system = type(files.system)

    def half(self, source, target, **_):
        Path(target.removeprefix("file://")).write_bytes(Path(source).read_bytes()[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(system, "put_file", half)
    with refuses(Fault, "outputs/a", "No space left"):
        put(files, tmp_path, "outputs/a", b"one")
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []
    assert fsspec.filesystem("file") is not None
