"""The files below a folder, links followed, and their names as people write them in tables."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

_Ids = tuple[tuple[int, int], ...]


@dataclass
class Files:
    """The files below a folder by name, in a stable order, and what else there is.

    `broken` is no file, such as a link to nowhere; `loops` are links to a folder that holds them.
    """

    names: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    hidden: int = 0


def walk(folder: Path) -> Files:
    """The files below `folder`, by their names relative to it, links to folders followed.

    Hidden ones are counted, not entered; a link to a folder that holds it is not followed. Raises
    OSError where a folder cannot be read.
    """
    files = Files()
    stat = folder.stat()
    _walk(folder, "", ((stat.st_dev, stat.st_ino),), files)
    # In the order of paths, which compare part by part.
    files.names.sort(key=lambda name: name.split("/"))
    return files


def _walk(folder: Path, prefix: str, above: _Ids, files: Files) -> None:
    for entry in _entries(folder):
        name = f"{prefix}{entry.name}"
        if entry.name.startswith("."):
            files.hidden += 1
            continue
        try:
            stat = entry.stat()
        except OSError:
            files.broken.append(name)  # a link to nowhere, or to itself
            continue
        inside = (stat.st_dev, stat.st_ino)
        if entry.is_file():
            files.names.append(name)
        elif not entry.is_dir():
            files.broken.append(name)
        elif inside in above:
            files.loops.append(name)
        else:
            _walk(Path(entry.path), f"{name}/", (*above, inside), files)


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from sorted(entries, key=lambda entry: entry.name)


def plain(name: str, root: Path | None = None) -> str:
    """A file's name however it is written, to compare by: `./a//b`, `a\\b` and a path below `root` are `a/b`.

    Accented letters have one form (NFC), since file systems and programs write two.
    """
    name = name.strip()
    if "://" in name:
        return name
    path = PurePosixPath(name.replace("\\", "/"))
    for folder in (root, root.resolve()) if root and path.is_absolute() else ():
        if path.is_relative_to(folder):
            path = path.relative_to(folder)
    return unicodedata.normalize("NFC", str(path))


def existing(root: Path, name: str) -> str | None:
    """The name of the file below `root` that a table calls `name`; None where there is none."""
    written = plain(name, root)
    forms = (name, written, unicodedata.normalize("NFD", written))
    return next((form for form in forms if _is_file(root / form)), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False  # such as a name that is too long to be one
