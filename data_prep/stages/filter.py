"""filter"""

from __future__ import annotations

import pyarrow as pa

from data_prep.stage import Stage, Workspace
from sora_train.config.sections.base import Section


class FilterConfig(Section):
    """`filter:`"""


def filter(rows: pa.Table, settings: FilterConfig, workspace: Workspace) -> pa.Table:
    return pa.table({"filter_stub": ["x"] * len(rows)})


STAGE = Stage(
    name="filter",
    run=filter,
    config=FilterConfig,
    adds=pa.schema([("filter_stub", pa.string())]),
    reads=("source_digest",),
    whole=True,
)
