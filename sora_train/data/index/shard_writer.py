"""Writes tar shards in webdataset's layout with their manifest.

A sample is the members `key.mp4` (or another extension), `key.txt` (its caption) and `key.json`
(its figures, further captions and scores). Everything is written under temporary names; `close`
renames the shards and writes the manifest last, so a folder with a manifest is whole.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sora_train.data.latents.members import LATENTS, TEXT, as_members, describe_bytes
from sora_train.data.manifest import FILE_NAME, Manifest, empty_row
from sora_train.errors import Fault, UserError

BLOCK = 512
_TEMPORARY = ".tmp"


class ShardWriter:
    """Writes samples into `prefix-000000.tar`, ... of about `max_bytes`, and their manifest.

    As a context manager it closes on success and leaves nothing behind on an error. Raises
    UserError where `output_dir` already holds something.
    """

    def __init__(
        self,
        output_dir: Path | str,
        max_bytes: int = 1 << 30,
        prefix: str = "shard",
        source: str = "",
    ):
        self.root = Path(output_dir)
        self.max_bytes = max_bytes
        self.prefix = prefix
        self.source = source
        self.root.mkdir(parents=True, exist_ok=True)
        present = [path.name for path in self.root.iterdir() if not path.name.endswith(_TEMPORARY)]
        if present:
            raise UserError(
                f"the output folder {self.root} is not empty (it holds {present[0]}); name a new one or empty it"
            )
        self._rows: list[dict[str, object]] = []
        self._keys: set[str] = set()
        self._shards: list[str] = []
        self._file: Any = None
        self._tar: Any = None
        self._written: dict[str, tuple[int, int]] = {}
        """The byte range of each sample of the open shard, by its member's name."""

    def write(
        self,
        key: str,
        video_bytes: bytes,
        ext: str,
        caption: str,
        meta: dict[str, object],
        beside: Mapping[str, bytes] | None = None,
    ) -> None:
        """Add a sample; `meta` holds the manifest's columns that are known of it (frames, fps, ...).

        `beside` are further members by extension. Latents may take the clip's place: `ext` is then
        theirs. Raises UserError on a key that was written before.
        """
        if key in self._keys:
            raise UserError(f"the key {key!r} occurs twice; every clip needs a name of its own")
        self._keys.add(key)
        if self._tar is None or self._tar.tarstream.offset >= self.max_bytes:
            self._next_shard()
        known: dict[str, object] = {
            name: meta[name]
            for name in ("frames", "fps", "height", "width", "duration")
            if name in meta
        }
        for name in ("captions", "scores", "provenance"):
            if meta.get(name):
                known[name] = json.loads(str(meta[name]))
        members = {**(beside or {}), ext: video_bytes, "json": json.dumps(known).encode()}
        if caption:
            members["txt"] = caption.encode()
        # One by one, as only the tar knows how many blocks the header of a name takes.
        places: dict[str, tuple[int, int]] = {}
        for name in sorted(members):
            self._tar.write({"__key__": key, name: members[name]})
            length = len(members[name])
            places[name] = (self._tar.tarstream.offset - -(-length // BLOCK) * BLOCK, length)
        self._written[f"{key}.{ext}"] = places[ext]
        stored = [name for name in (LATENTS, TEXT) if name in members]
        self._rows.append(
            empty_row(
                **{
                    **meta,
                    "source": self.source,
                    "shard": self._shards[-1],
                    "key": key,
                    "offset": places[ext][0],
                    "length": len(video_bytes),
                    "caption": caption,
                    "members": as_members(
                        {name: places[name] for name in stored},
                        {name: describe_bytes(members[name], name) for name in stored},
                    ),
                }
            )
        )

    def add_dropped(self, row: dict[str, object]) -> None:
        """Add the row of a sample that is not written, with its key and `drop_reason`."""
        self._rows.append(
            empty_row(**{**row, "source": self.source, "shard": "", "offset": 0, "length": 0})
        )

    def placed(self) -> dict[str, str]:
        """The shard of each key that was written."""
        return {str(row["key"]): str(row["shard"]) for row in self._rows if row["shard"]}

    def close(self) -> Manifest:
        """Give the shards their names and write the manifest. Raises Fault where a sample is not at its place."""
        self._end_shard()
        self._require_places()
        for shard in self._shards:
            os.replace(self.root / f"{shard}{_TEMPORARY}", self.root / shard)
        manifest = Manifest.from_rows(self._rows, self.root)
        manifest.save(self.root / FILE_NAME)
        return manifest

    def abort(self) -> None:
        """Remove what was written."""
        self._end_shard()
        for shard in self._shards:
            (self.root / f"{shard}{_TEMPORARY}").unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        except Fault:
            self.abort()
            raise
        if kind is not None:
            self.abort()

    def _next_shard(self) -> None:
        # webdataset imports torch, which readers of shards must not.
        from webdataset.writer import TarWriter

        self._end_shard()
        self._require_places()
        self._shards.append(f"{self.prefix}-{len(self._shards):06d}.tar")
        self._file = open(self.root / f"{self._shards[-1]}{_TEMPORARY}", "wb")  # noqa: SIM115 - see _end_shard
        # A fixed time makes equal samples equal shards.
        self._tar = TarWriter(self._file, encoder=False, mtime=0)

    def _end_shard(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._tar = self._file = None

    def _require_places(self) -> None:
        """Raise Fault where a reader of the last shard finds a sample elsewhere than its manifest would say."""
        if not self._written:
            return
        path = self.root / f"{self._shards[-1]}{_TEMPORARY}"
        with tarfile.open(path, "r:") as tar:
            found = {member.name: (member.offset_data, member.size) for member in tar}
        wrong = [name for name, place in self._written.items() if found.get(name) != place]
        if wrong:
            raise Fault(
                f"{path} holds {wrong[0]!r} at {found.get(wrong[0])} where {self._written[wrong[0]]} was "
                "counted (offset, bytes); the storage returns other bytes than were written, check it"
            )
        self._written = {}
