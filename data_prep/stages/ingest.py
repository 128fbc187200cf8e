"""Lists the sources: what they are called, where their bytes lie, and what is known of them beforehand."""

from __future__ import annotations

from dataclasses import asdict

import pyarrow as pa

from data_prep.sources.listing import list_sources
from data_prep.stage import DROPS, OF_ROW, Stage, Workspace
from sora_train.config.sections.base import Section


class IngestConfig(Section):
    """`ingest:`"""

    captions: str = ""
    """A table of captions for a folder; empty: `captions.jsonl` in it, or a .txt beside each file."""
    follow_links: bool = False
    """Take files that are links to somewhere outside of the folder."""


def ingest(rows: pa.Table, settings: IngestConfig, workspace: Workspace) -> pa.Table:
    """A row for each source of the input, in a stable order. Raises UserError as `list_sources` does."""
    sources = list_sources(workspace.input, settings.captions, settings.follow_links)
    schema = pa.unify_schemas([STAGE.adds, DROPS, pa.schema([(OF_ROW, pa.int64())])])
    return pa.Table.from_pylist(
        [asdict(source) | {OF_ROW: 0, "drop_stage": ""} for source in sources], schema
    )


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
