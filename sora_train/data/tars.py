"""Lists a webdataset tar without reading the clips in it: where each begins, and its caption."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sora_train.errors import UserError

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# A caption is text; whatever is larger under such a name is something else.
MAX_CAPTION_BYTES = 1 << 20


@dataclass
class TarSample:
    """The members of one key: the clip's byte range, its caption, and a fault where bytes are missing."""

    key: str
    name: str = ""
    kind: str = ""
    offset: int = 0
    length: int = 0
    fault: str = ""
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def caption(self) -> str:
        if "txt" in self.texts:
            return self.texts["txt"].strip()
        try:
            known = json.loads(self.texts.get("json", "{}"))
        except json.JSONDecodeError:
            return ""
        found = known.get("caption") or known.get("text") if isinstance(known, dict) else ""
        return found.strip() if isinstance(found, str) else ""


def split_name(name: str) -> tuple[str, str]:
    """Webdataset's key and extension: the file's name is split at its first dot."""
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def list_tar(path: Path, media_kind: Callable[[str], str]) -> list[TarSample]:
    """The samples of a tar in its order, keys without a clip left out.

    A clip cut off by the end of the file is listed with its fault. Raises UserError on a compressed
    tar, on what is no tar, and on two members of one name.
    """
    with path.open("rb") as file:
        head = file.read(8)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(
                f"{path} is compressed ({name}) under the name of a plain tar; decompress it first"
            )
    samples: dict[str, TarSample] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    _add(tar, member, size, samples, media_kind, path)
    except tarfile.ReadError as error:
        if not samples:
            raise UserError(
                f"{path} is not a tar file ({error}); remove it or make it again"
            ) from error
        # The end is missing; the sample it cut is marked already, and those before it are whole.
    return [sample for sample in samples.values() if sample.kind]


def _add(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    size: int,
    samples: dict[str, TarSample],
    media_kind: Callable[[str], str],
    path: Path,
) -> None:
    key, extension = split_name(member.name)
    sample = samples.setdefault(key, TarSample(key))
    whole = member.offset_data + member.size <= size
    kind = media_kind(member.name)
    if kind and (not sample.kind or (kind == "video" and sample.kind == "image")):
        sample.name, sample.kind = member.name, kind
        sample.offset, sample.length = member.offset_data, member.size
        sample.fault = "" if whole else f"the shard {path.name} is cut off inside the clip"
    elif kind and kind == sample.kind:
        raise UserError(
            f"{path} holds two clips under the key {key!r} ({sample.name}, {member.name}); give each its own"
        )
    elif extension in ("txt", "json") and whole and member.size <= MAX_CAPTION_BYTES:
        data = tar.extractfile(member)
        assert data is not None, "a regular member can be read"
        sample.texts[extension] = data.read().decode(errors="replace")
