"""Committing a checkpoint: all files on disk, then the manifest with their digests, then one rename.

A folder under its final name is whole at every moment, and a step that is saved again is never without
a whole checkpoint: the one before is moved aside, and is what counts until the new one has the name.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from sora_train.checkpoint.layout import LATEST, MANIFEST, REPLACED, STATE, complete
from sora_train.checkpoint.points import reach

Files = dict[str, dict[str, int | str]]
"""File name -> its `size` in bytes and `sha256`."""


def begin(temporary: Path) -> None:
    """Make an empty folder to write to; files of a torn save are removed."""
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)


def written_by(rank: int, temporary: Path) -> list[Path]:
    """The files that DCP has written on a rank."""
    return sorted(temporary.glob(f"__{rank}_*"))


def digests(paths: Iterable[Path]) -> Files:
    return {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in paths}


def commit(temporary: Path, final: Path, state: str, files: Files) -> None:
    """Write the state and the manifest, and rename; `files` are those whose digests are known already."""
    folder = final.parent
    write_synced(temporary / STATE, state)
    reach("before_manifest", folder)
    others = [path for path in sorted(temporary.iterdir()) if path.name not in files]
    whole = files | digests(others)
    write_synced(
        temporary / MANIFEST,
        json.dumps({"files": {name: whole[name] for name in sorted(whole)}}, indent=1),
    )
    sync_folder(temporary)
    reach("after_manifest", folder)
    _take_name(temporary, final)


def commit_fetched(temporary: Path, final: Path) -> None:
    """As `commit`, of a folder that has its manifest already and was verified."""
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(temporary)
    _take_name(temporary, final)


def _take_name(temporary: Path, final: Path) -> None:
    folder = final.parent
    replaced = final.with_name(final.name + REPLACED)
    if replaced.exists() and complete(final):
        shutil.rmtree(replaced)
    if complete(final):
        final.replace(replaced)
    elif final.exists():
        shutil.rmtree(final)
    reach("between_renames", folder)
    temporary.replace(final)
    reach("after_rename", folder)
    sync_folder(folder)
    if replaced.exists():
        shutil.rmtree(replaced)
    pointer = folder / (LATEST + ".tmp")
    write_synced(pointer, final.name)
    reach("before_latest", folder)
    pointer.replace(folder / LATEST)
    sync_folder(folder)


def write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Have the names in a folder outlive a power cut, as the files' contents do."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(1 << 20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()
