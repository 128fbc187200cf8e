"""Where videos and uploads lie: a folder, or any address that fsspec knows; files appear there whole or not at all."""

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from sora_train.base.files import renamed_when_whole
from sora_train.data.storage.remote import filesystem, is_remote
from sora_train.errors import Fault

APPEAR_WHOLE = ("s3", "gs", "gcs", "az", "abfs", "abfss")
"""Object stores, where an upload is seen when it is whole; elsewhere a file gets its name at the end."""
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


class FileStore:
    """Files by names such as `outputs/video_1/3f2a/video.mp4`."""

    def __init__(self, where: str | Path):
        """
        Args:
            where: a folder, or an address such as `s3://bucket/prefix`.

        Raises:
            UserError: the address needs a package that is not installed.
        """
        self.where = str(where).rstrip("/")
        self.system: Any = filesystem(self.where) if is_remote(self.where) else None
        self._whole = self.where.partition("://")[0].lower() in APPEAR_WHOLE

    def put(self, name: str, source: Path) -> None:
        """Copy a file into the store, where it replaces one of that name. Raises Fault, or OSError on a full disk."""
        if self.system is None:
            with renamed_when_whole(Path(self._path(name))) as partial:
                shutil.copyfile(source, partial)
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
            return
        with self._asked("write", name) as path:
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            if self._whole:
                self.system.put_file(str(source), path)
                return
            partial_path = f"{path}.{uuid.uuid4().hex}.tmp"
            try:
                self.system.put_file(str(source), partial_path)
                self.system.mv(partial_path, path)
            finally:
                if self.system.exists(partial_path):
                    self.system.rm_file(partial_path)

    def get(self, name: str, target: Path) -> None:
        """Copy a file out of the store, whole. Raises FileNotFoundError, or Fault."""
        with renamed_when_whole(target) as partial:
            if self.system is None:
                shutil.copyfile(self._path(name), partial)
                return
            with self._asked("read", name) as path:
                self.system.get_file(path, str(partial))

    def open(self, name: str) -> BinaryIO:
        """A file to read and seek in. Raises FileNotFoundError, or Fault."""
        if self.system is None:
            return Path(self._path(name)).open("rb")
        with self._asked("read", name) as path:
            return cast(BinaryIO, self.system.open(path, "rb"))

    def size(self, name: str) -> int | None:
        """Bytes; None where there is no such file. Raises Fault."""
        if self.system is None:
            path = Path(self._path(name))
            return path.stat().st_size if path.is_file() else None
        with contextlib.suppress(FileNotFoundError), self._asked("find", name) as address:
            return int(self.system.info(address)["size"])
        return None

    def local(self, name: str) -> Path | None:
        """The file's own path, where the store is a folder."""
        return Path(self._path(name)) if self.system is None else None

    def names(self, folder: str) -> list[str]:
        """Every file below a folder, sorted. Raises Fault."""
        if self.system is None:
            root = Path(self._path(folder))
            found = (path for path in root.rglob("*") if path.is_file())
            return sorted(f"{folder}/{path.relative_to(root).as_posix()}" for path in found)
        with self._asked("list", folder) as address:
            self.system.invalidate_cache()
            root_path = self.system._strip_protocol(address)
            paths = self.system.find(root_path)
        return sorted(f"{folder}/{path[len(root_path) + 1 :]}" for path in paths)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all below it; what is not there is no error. Raises Fault."""
        if self.system is None:
            path = Path(self._path(name))
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError), self._asked("remove", name) as address:
            self.system.rm(address, recursive=True)

    def _path(self, name: str) -> str:
        """Raises ValueError for a name that leads out of the store."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a file in the store")
        return f"{self.where}/{name}"

    @contextlib.contextmanager
    def _asked(self, what: str, name: str) -> Iterator[str]:
        """The file's address, to ask the file system about."""
        path = self._path(name)
        try:
            yield path
        except FileNotFoundError:
            raise
        # Each protocol's client raises its own exceptions.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Fault(
                f"cannot {what} {name} in {self.where}: {reason[:200]}; check the storage and its access"
            ) from error
