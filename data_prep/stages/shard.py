"""Writes the clips that are kept into tars with the training manifest: equal clips give equal bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import Field

from data_prep.media.made import PROBED
from data_prep.shards import shard_key
from data_prep.stage import Stage, Workspace
from data_prep.stages import score
from sora_train.base.files import read_json, write_atomically
from sora_train.config.sections.base import Section
from sora_train.config.sections.data import StrList
from sora_train.data.captions.texts import dumped
from sora_train.data.index.shard_writer import ShardWriter
from sora_train.data.manifest import FILE_NAME
from sora_train.data.storage.ranges import StorageFault, read_bytes
from sora_train.errors import Fault

RECORD = "shards.json"
SCORES = tuple(
    field.name
    for field in score.STAGE.adds
    if pa.types.is_floating(field.type) or pa.types.is_integer(field.type)
)


class ShardConfig(Section):
    """`shard:`"""

    max_mb: int = Field(512, ge=1)
    """Size at which a new tar is begun, in MB."""
    scores: StrList = ()
    """Columns of numbers beside those of `score` that become scores of the manifest, such as a stage of yours adds."""


def shard(rows: pa.Table, settings: ShardConfig, workspace: Workspace) -> pa.Table:
    """The tars and `manifest.parquet` in the output folder, and in `480p/` and the like those of smaller copies.

    They are written anew only where the clips or the settings changed, and appear with the manifest last.
    """
    listed = rows.to_pylist()
    keys: set[str] = set()
    named = [
        (row, "" if row["drop_reason"] else shard_key(row["key"].replace("#", "-"), keys))
        for row in listed
    ]
    clips = [(row, key) for row, key in named if key]
    shards = dict.fromkeys(keys, "")
    for folder, members in _sets(clips, workspace):
        placed = _written(folder, list(members), settings, workspace)
        if folder == workspace.out:
            shards = placed
    return pa.table(
        {
            "shard_key": pa.array([key for _, key in named], pa.string()),
            "shard": pa.array([shards.get(key, "") for _, key in named], pa.string()),
        }
    )


Member = tuple[Mapping[str, Any], Mapping[str, Any], str]
"""A row, what is known of the file that stands for it (the clip's own columns, or a smaller copy's), and its key."""


def _sets(
    clips: list[tuple[dict[str, Any], str]], workspace: Workspace
) -> Iterator[tuple[Path, list[Member]]]:
    yield workspace.out, [(row, row, key) for row, key in clips]
    sides = sorted({one["short_side"] for row, _ in clips for one in row.get("variants") or ()})
    for side in sides:
        copies: list[Member] = [
            (row, one, key)
            for row, key in clips
            for one in row.get("variants") or ()
            if one["short_side"] == side
        ]
        yield workspace.out / f"{side}p", copies


def _written(
    folder: Path, members: list[Member], settings: ShardConfig, workspace: Workspace
) -> dict[str, str]:
    """Write a set of shards, if they are not there; the tar of each key."""
    name = folder.name if folder != workspace.out else "clips"
    record = workspace.out / "prep" / f"{name}-{RECORD}"
    metas = [(key, str(file["file"]), _meta(row, file, settings)) for row, file, key in members]
    made_of = hashlib.sha256(json.dumps([settings.max_mb, metas]).encode()).hexdigest()[:32]
    before = read_json(record) or {}
    if before.get("made_of") == made_of and _is_whole(folder, before["bytes"]):
        return dict(before["shards"])
    partial = workspace.out / "prep" / f"{name}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    with ShardWriter(partial, settings.max_mb * 10**6, source=workspace.out.name) as writer:
        for (row, file, key), (_, _, meta) in zip(members, metas, strict=True):
            extension = str(file["file"]).rpartition(".")[2]
            writer.write(key, _bytes(file, workspace), extension, row["caption"] or "", meta)
    placed = _moved(partial, folder, writer)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("shard-*.tar"))}
    write_atomically(record, json.dumps({"made_of": made_of, "bytes": sizes, "shards": placed}))
    return placed


def _is_whole(folder: Path, sizes: Mapping[str, int]) -> bool:
    return (folder / FILE_NAME).exists() and all(
        (folder / name).exists() and (folder / name).stat().st_size == size
        for name, size in sizes.items()
    )


def _moved(partial: Path, folder: Path, writer: ShardWriter) -> dict[str, str]:
    """Put shards in their place; a folder with a manifest is whole, so it goes first and comes last."""
    folder.mkdir(exist_ok=True)
    (folder / FILE_NAME).unlink(missing_ok=True)
    for path in folder.glob("shard-*.tar"):
        path.unlink()
    for path in sorted(partial.glob("shard-*.tar")):
        os.replace(path, folder / path.name)
    os.replace(partial / FILE_NAME, folder / FILE_NAME)
    partial.rmdir()
    return writer.placed()


def _bytes(file: Mapping[str, Any], workspace: Workspace) -> bytes:
    path = workspace.files / file["file"]
    try:
        data = read_bytes(str(path), 0, file["bytes"])
    except StorageFault as error:
        raise Fault(
            f"the clip {path} is gone ({error}); remove {workspace.ledger / 'clip'} to have it made again"
        ) from error
    return data


def _meta(row: Mapping[str, Any], file: Mapping[str, Any], settings: ShardConfig) -> dict[str, Any]:
    """The manifest's columns of a clip."""
    scores = {
        name: float(row[name]) for name in (*SCORES, *settings.scores) if row.get(name) is not None
    }
    provenance = {
        "source": row["source"],
        "digest": row["source_digest"],
        "begin": round(row["begin"], 6),
        "end": round(row["end"], 6),
        "crop": row["crop"],
        "licence": row["licence"],
        **json.loads(row["provenance"] or "{}"),
    }
    known = {name: file[name] for name in PROBED if name != "digest"}
    return known | {
        "kind": row["source_kind"],
        "sample_digest": file["digest"],
        "captions": row["captions"] or "",
        "scores": dumped(scores),
        "provenance": dumped(provenance),
    }


STAGE = Stage(
    name="shard",
    run=shard,
    config=ShardConfig,
    whole=True,
    is_remembered=False,
    adds=pa.schema([("shard_key", pa.string()), ("shard", pa.string())]),
)
