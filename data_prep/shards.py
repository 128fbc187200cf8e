"""Turns real files into webdataset shards with a manifest: what `sora prep shards` does."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from sora_train.data.index.folder import open_source
from sora_train.data.index.kinds import media_kind
from sora_train.data.index.shard_writer import ShardWriter
from sora_train.data.latents.members import KIND, LATENTS
from sora_train.data.manifest import FILE_NAME, Manifest
from sora_train.data.storage.ranges import StorageFault, read_bytes
from sora_train.errors import Fault, UserError


def write_shards(
    input: str,
    output: str,
    *,
    captions: str = "",
    max_shard_bytes: int = 1 << 29,
    allow_empty_captions: bool = False,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Write the usable clips of `input` (any form of source) into tars of about `max_shard_bytes`.

    Every clip is decoded once to know its real frame count; one that cannot be used keeps its row
    in the manifest, with the reason. `output` appears whole or not at all. `progress(done, total)`
    counts probed clips. Raises UserError on an output that is not empty, and whatever
    `open_source` raises.
    """
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(
            f"output={output} is not an empty folder; name a new one, or empty it first"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with tempfile.TemporaryDirectory() as work_dir:
            source = open_source(
                input,
                captions=captions,
                work_dir=work_dir,
                workers=workers,
                progress=progress,
                allow_empty_captions=allow_empty_captions,
            )
        with ShardWriter(partial, max_shard_bytes, source=Path(input).name) as writer:
            keys: set[str] = set()
            for row in range(len(source)):
                _copy(source, row, keys, writer)
        if target.exists():
            target.rmdir()
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Manifest.load(target / FILE_NAME, root=target)


def _copy(source: Manifest, row: int, keys: set[str], writer: ShardWriter) -> None:
    known = source.row(row)
    caption, _ = known.pop("caption"), known.pop("caption_digest")
    name = str(known["key"])
    if known["drop_reason"]:
        writer.add_dropped({**known, "caption": caption})
        return
    stem, extension = _split(name, known)
    try:
        data = read_bytes(source.path(row), int(source.offset[row]), int(source.length[row]))
    except StorageFault as error:
        raise Fault(f"the clip {name!r} cannot be read: {error}") from error
    writer.write(shard_key(stem, keys), data, extension, str(caption), known)


def _split(name: str, known: dict[str, object]) -> tuple[str, str]:
    """Name without extension, and an extension that says what the bytes are."""
    if name == known["shard"]:
        stem, _, extension = name.rpartition(".")
        return stem, extension.lower()
    if known["kind"] == KIND:
        return name, LATENTS
    codec = str(known["codec"])
    # Some names of codecs are no extensions of images, and a reader goes by the bytes.
    image = codec if media_kind(f"{name}.{codec}") == "image" else "png"
    return name, "mp4" if known["kind"] == "video" else image


def shard_key(stem: str, keys: set[str]) -> str:
    """A key of its own, put into `keys`: webdataset ends keys at the first dot, and `a.mp4` may be beside `a.png`."""
    base = stem.replace("/", "-").replace(".", "-")
    key, number = base, 2
    while key in keys:
        key, number = f"{base}-{number}", number + 1
    keys.add(key)
    return key
