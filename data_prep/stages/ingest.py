"""Lists the sources: what they are called, where their bytes lie, and what is known of them beforehand."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from data_prep.stage import OF_ROW, Stage, Workspace
from sora_train.config.sections.base import Section
from sora_train.data.index.listing import list_source
from sora_train.errors import UserError


class IngestConfig(Section):
    """`ingest:`"""

    captions: str = ""
    """A table of captions for a folder; empty: `captions.jsonl` in it, or a .txt beside each file."""


def ingest(rows: pa.Table, settings: IngestConfig, workspace: Workspace) -> pa.Table:
    """A row for each source of `input`, in the order of their names."""
    path = Path(workspace.input).expanduser()
    if not path.exists():
        raise UserError(
            f"input={workspace.input} does not exist; give a folder, a list or a table of videos"
        )
    listed = list_source(path, settings.captions)
    found = []
    for member in listed.members:
        file = listed.root / member.shard
        stat = file.stat()
        found.append(
            {
                "key": member.key,
                "path": str(file.resolve()),
                "offset": member.offset,
                "length": member.length or stat.st_size,
                "stamp": f"{stat.st_size} {stat.st_mtime_ns}",
                "kind": member.kind,
                "given_caption": member.caption,
                "given_captions": member.captions,
                "licence": "",
                "provenance": "",
                "range_begin": None,
                "range_end": None,
                "drop_reason": (member.reason or "unreadable") if member.fault else "",
                "drop_detail": member.fault,
                OF_ROW: 0,
            }
        )
    return pa.Table.from_pylist(found, schema=None)


STAGE = Stage(
    name="ingest",
    run=ingest,
    config=IngestConfig,
    whole=True,
    is_remembered=False,
    adds=pa.schema(
        [
            ("key", pa.string()),
            ("path", pa.string()),
            ("offset", pa.int64()),
            ("length", pa.int64()),
            ("stamp", pa.string()),
            ("kind", pa.string()),
            ("given_caption", pa.string()),
            ("given_captions", pa.string()),
            ("licence", pa.string()),
            ("provenance", pa.string()),
            ("range_begin", pa.float64()),
            ("range_end", pa.float64()),
        ]
    ),
)
