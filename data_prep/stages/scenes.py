"""scenes"""

from __future__ import annotations

import pyarrow as pa

from data_prep.stage import Stage, Workspace
from sora_train.config.sections.base import Section


class ScenesConfig(Section):
    """`scenes:`"""


def scenes(rows: pa.Table, settings: ScenesConfig, workspace: Workspace) -> pa.Table:
    return pa.table({"scenes_stub": ["x"] * len(rows)})


STAGE = Stage(
    name="scenes",
    run=scenes,
    config=ScenesConfig,
    adds=pa.schema([("scenes_stub", pa.string())]),
    reads=("source_digest",),
    whole=False,
)
