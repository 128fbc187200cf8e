"""From the transitions of all parts of a source to its clips."""

from __future__ import annotations

import pyarrow as pa

from data_prep.stage import OF_ROW, Stage, Workspace
from sora_train.config.sections.base import Section


class CutConfig(Section):
    """`cut:`"""


def cut(rows: pa.Table, settings: CutConfig, workspace: Workspace) -> pa.Table:
    found = []
    for number, row in enumerate(rows.to_pylist()):
        begin, end = row["part_begin"], row["part_end"]
        key = row["key"] if begin is None else f"{row['key']}#{begin:.3f}-{end:.3f}"
        found.append(
            {
                "key": key,
                "source": row["key"],
                "scene": 0,
                "begin": begin,
                "end": end,
                OF_ROW: number,
            }
        )
    return pa.Table.from_pylist(found, schema=STAGE.adds.append(pa.field(OF_ROW, pa.int64())))


STAGE = Stage(
    name="cut",
    run=cut,
    config=CutConfig,
    adds=pa.schema(
        [
            ("key", pa.string()),
            ("source", pa.string()),
            ("scene", pa.int64()),
            ("begin", pa.float64()),
            ("end", pa.float64()),
        ]
    ),
    whole=True,
)
