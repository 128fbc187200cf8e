"""The manifest: one row a sample, what it is and where its bytes lie, or why it cannot be used.

It is a Parquet file and, in memory, one numpy array a column, so that a plan over millions of rows
stays vectorised. A sample that cannot be used keeps its row, with the reason.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sora_train.base.files import renamed_when_whole
from sora_train.errors import UserError

FILE_NAME = "manifest.parquet"
VERSION = "6"
READABLE_VERSIONS = ("1", "2", "3", "4", "5", "6")
_DIGEST_VERSION = "1"
_VERSION_KEY, _ROOT_KEY = b"sora_train.manifest", b"sora_train.root"
_SHARDS_KEY, _REVISION_KEY = b"sora_train.shards", b"sora_train.revision"
_DECODERS_KEY = b"sora_train.decoders"

# Name -> numpy dtype; `object` columns hold strings.
COLUMNS: dict[str, type] = {
    "source": object,
    "shard": object,
    "key": object,
    "kind": object,
    "offset": np.int64,
    "length": np.int64,
    "codec": object,
    "frames": np.int64,
    "fps": np.float64,
    "vfr": np.bool_,
    "height": np.int64,
    "width": np.int64,
    "rotation": np.int64,
    "duration": np.float64,
    "start": np.float64,
    "caption": object,
    "caption_digest": object,
    "sample_digest": object,
    "drop_reason": object,
    "drop_detail": object,
    "unverified": np.bool_,
    "captions": object,
    "members": object,
    "scores": object,
    "traits": object,
    "coding": object,
    "provenance": object,
}
# Columns that older versions do not have; they are filled with empty values.
_ADDED = frozenset(
    {"unverified", "captions", "members", "scores", "traits", "coding", "provenance"}
)
# Where a source is mounted, how a decoder words its error, how closely a clip was probed, its scores and where it
# comes from do not change what is trained; its traits and coding follow from its bytes.
_NOT_DIGESTED = frozenset(
    {"source", "drop_detail", "unverified", "scores", "traits", "coding", "provenance"}
)

Stamp = tuple[int, str]
"""Bytes and fingerprint of a shard when it was indexed."""
DecoderTimes = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Seconds by codec and coding, pattern of access, and decoder; see `sora_train.data.index.decoders`."""


def text_digest(text: str) -> str:
    """The first 32 hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def empty_row(**known: object) -> dict[str, object]:
    """A row with every column, zero or empty where `known` has no value."""
    unknown = known.keys() - COLUMNS.keys()
    assert not unknown, f"no such column: {sorted(unknown)}"
    row: dict[str, object] = {
        name: "" if dtype is object else dtype(0) for name, dtype in COLUMNS.items()
    }
    return {**row, **known, "caption_digest": text_digest(str(known.get("caption", "")))}


class Manifest:
    """The samples of a source. Columns are attributes: `manifest.fps[row]`; `root` is where shards lie.

    `shard` is relative to `root`; a loose file is a shard with one member. `height` and `width` are
    as displayed, `rotation` the degrees counter-clockwise that a stored frame still has to be
    turned, `start` the time of the first frame on the container's own clock, `sample_digest`
    that of the sample's bytes, `traits` words for what needs care when it is read (see TRAITS in
    decode/probe.py), `coding` what else decides which decoder is fastest (see Probe there). A shard
    named by an address (`s3://...`) needs no root. `unverified` marks rows that rest on a header
    alone. `shards` holds the stamp of each shard that has one, `revision` counts the times shards
    were added, and `decoders` are the times of decoders that were measured when the source was
    indexed. `left_out` counts, by kind, the files of a folder that are no clips; it is not saved.

    Four columns hold JSON objects or '': `captions` the further captions by name
    (`{"short": "...", "dense": "..."}`), `members` the byte ranges of latents and text beside or
    instead of the clip (`{"latents.safetensors": [offset, length]}`, see latents/members.py), `scores`
    numbers by name (`{"aesthetic": 5.2}`), `provenance` where the clip comes from (its source's name and digest, the
    times in it, the licence).
    """

    source: np.ndarray
    shard: np.ndarray
    key: np.ndarray
    kind: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    codec: np.ndarray
    frames: np.ndarray
    fps: np.ndarray
    vfr: np.ndarray
    height: np.ndarray
    width: np.ndarray
    rotation: np.ndarray
    duration: np.ndarray
    start: np.ndarray
    caption: np.ndarray
    caption_digest: np.ndarray
    sample_digest: np.ndarray
    drop_reason: np.ndarray
    drop_detail: np.ndarray
    unverified: np.ndarray
    captions: np.ndarray
    members: np.ndarray
    scores: np.ndarray
    traits: np.ndarray
    coding: np.ndarray
    provenance: np.ndarray

    def __init__(
        self,
        columns: Mapping[str, np.ndarray],
        root: Path | str,
        shards: Mapping[str, Stamp] | None = None,
        revision: int = 1,
        decoders: DecoderTimes | None = None,
    ):
        lengths = {len(column) for column in columns.values()}
        assert set(columns) == set(COLUMNS) and len(lengths) == 1, (
            "a manifest has all columns, equally long"
        )
        self.root = Path(root)
        self.shards = dict(shards or {})
        self.revision = revision
        self.decoders: DecoderTimes = dict(decoders or {})
        self.left_out: Mapping[str, int] = {}
        self._columns = dict(columns)
        for name, column in columns.items():
            setattr(self, name, column)

    def __len__(self) -> int:
        return len(self.key)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, object]], root: Path | str) -> Manifest:
        """A manifest of rows as made by `empty_row`."""
        listed = list(rows)
        columns = {}
        for name, dtype in COLUMNS.items():
            column: np.ndarray = np.empty(len(listed), dtype)
            column[:] = [row[name] for row in listed]
            columns[name] = column
        return cls(columns, root)

    def row(self, row: int) -> dict[str, object]:
        """One sample, in plain Python values."""
        return {name: column[row : row + 1].tolist()[0] for name, column in self._columns.items()}

    def path(self, row: int) -> str:
        """The file that holds a row's bytes, or its address."""
        return self.shard_path(str(self.shard[row]))

    def shard_path(self, shard: str) -> str:
        """Where a shard lies: an address as it is, a path under the root."""
        return shard if "://" in shard else str(self.root / shard)

    def select(self, rows: np.ndarray) -> Manifest:
        """The rows of these numbers or this mask, in their order, renumbered."""
        columns = {name: column[rows] for name, column in self._columns.items()}
        return Manifest(columns, self.root, self.shards, self.revision, self.decoders)

    @classmethod
    def joined(
        cls,
        parts: Sequence[Manifest],
        root: Path | str,
        shards: Mapping[str, Stamp],
        revision: int = 1,
    ) -> Manifest:
        """The rows of `parts` one after the other; of times of decoders the first that were measured count."""
        columns = {
            name: np.concatenate([np.empty(0, dtype), *(getattr(part, name) for part in parts)])
            for name, dtype in COLUMNS.items()
        }
        decoders = {
            name: times for part in reversed(parts) for name, times in part.decoders.items()
        }
        return cls(columns, root, shards, revision, decoders)

    def with_columns(self, **changed: np.ndarray) -> Manifest:
        """The same samples with some columns replaced."""
        return Manifest(
            {**self._columns, **changed}, self.root, self.shards, self.revision, self.decoders
        )

    def dropped(self) -> dict[str, int]:
        """How many samples cannot be used, by reason."""
        return dict(Counter(reason for reason in self.drop_reason.tolist() if reason))

    def traits_counted(self) -> dict[str, int]:
        """How many usable samples have each trait."""
        usable = self.traits[self.drop_reason == ""]
        return dict(Counter(trait for traits in usable.tolist() for trait in traits.split()))

    @cached_property
    def _digest(self) -> str:
        state = hashlib.sha256(_DIGEST_VERSION.encode())
        for name, dtype in COLUMNS.items():
            if name in _NOT_DIGESTED:
                continue
            column = self._columns[name]
            if name in _ADDED and not column.any():
                continue  # the samples are those of a manifest without the column
            data = (
                "\x1f".join(column).encode()
                if dtype is object
                else np.ascontiguousarray(column).tobytes()
            )
            state.update(f"\x1e{name}\x1e{len(data)}\x1e".encode())
            state.update(data)
        return state.hexdigest()[:32]

    def digest(self) -> str:
        """Names the content: equal for equal samples, wherever they are mounted."""
        return self._digest

    def save(self, path: Path | str) -> None:
        """Write Parquet under a temporary name, then rename."""
        path = Path(path)
        metadata = {_VERSION_KEY: VERSION.encode(), _REVISION_KEY: str(self.revision).encode()}
        if self.shards:
            metadata[_SHARDS_KEY] = json.dumps(self.shards).encode()
        if self.decoders:
            metadata[_DECODERS_KEY] = json.dumps(self.decoders, sort_keys=True).encode()
        if self.root.resolve() != path.parent.resolve():
            metadata[_ROOT_KEY] = str(self.root.resolve()).encode()
        arrays = {
            name: pa.array(column, pa.string() if COLUMNS[name] is object else None)
            for name, column in self._columns.items()
        }
        table = pa.table(arrays).replace_schema_metadata(metadata)
        with renamed_when_whole(path) as partial:
            pq.write_table(table, partial, compression="zstd")

    @classmethod
    def load(cls, path: Path | str, root: Path | str | None = None) -> Manifest:
        """Read a manifest. Raises UserError where the file is none, or of an unknown version."""
        path = Path(path)
        try:
            # The table reader would read `key=value` folders of the path as columns.
            table = pq.ParquetFile(path).read()
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{path} cannot be read as a manifest ({error}); index the source again"
            ) from error
        metadata = table.schema.metadata or {}
        version = metadata.get(_VERSION_KEY, b"").decode()
        if version in READABLE_VERSIONS[:-1]:
            for name in sorted(_ADDED - set(table.column_names)):
                empty: object = "" if COLUMNS[name] is object else False
                table = table.append_column(name, pa.array([empty] * len(table)))
        missing = COLUMNS.keys() - set(table.column_names)
        if missing or version not in READABLE_VERSIONS:
            raise UserError(
                f"{path} is not a manifest of this version (missing: {', '.join(sorted(missing)) or 'none'}); "
                "remove it to have the source indexed again"
            )
        columns = {}
        for name, dtype in COLUMNS.items():
            column = table.column(name).to_numpy(zero_copy_only=False)
            columns[name] = column.astype(dtype, copy=False)
        stored_root = metadata.get(_ROOT_KEY, str(path.parent).encode()).decode()
        stamps = json.loads(metadata.get(_SHARDS_KEY, b"{}"))
        shards = {shard: (int(size), str(digest)) for shard, (size, digest) in stamps.items()}
        revision = int(metadata.get(_REVISION_KEY, b"1"))
        decoders = json.loads(metadata.get(_DECODERS_KEY, b"{}"))
        return cls(columns, stored_root if root is None else root, shards, revision, decoders)

    @staticmethod
    def is_manifest(path: Path) -> bool:
        """Whether a Parquet file is a manifest, of whatever version."""
        try:
            return _VERSION_KEY in (pq.ParquetFile(path).schema_arrow.metadata or {})
        except (OSError, pa.ArrowInvalid):
            return False
