"""Files that are written whole, and JSON files read while another process may be writing them."""

import contextlib
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sora_train.errors import Fault


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it.

    Raises:
        Fault: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Fault(
            f"cannot write {path}: {error.strerror}; free space or choose another run.dir"
        ) from error


@contextlib.contextmanager
def renamed_when_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, whose folder is made: renamed to it at the end, removed on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Ranks on two machines may write the same file at once; in containers even their process ids are equal.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def forget_partials(path: Path) -> None:
    """Remove what killed writers of `renamed_when_whole` left beside `path`, which nobody else writes now."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where the file is missing, not whole, or holds something else."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line; none where it is missing.

    Damaged lines are left out: a kill may cut one short, and the next is then joined to it.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


@contextlib.contextmanager
def folder_when_whole(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`: renamed to it at the end, removed on an error. `out` may be there, but empty."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        if out.exists():
            out.rmdir()
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
