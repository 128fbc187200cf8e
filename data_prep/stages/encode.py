"""encode"""

from __future__ import annotations

import pyarrow as pa

from data_prep.stage import Stage, Workspace
from sora_train.config.sections.base import Section


class EncodeConfig(Section):
    """`encode:`"""


def encode(rows: pa.Table, settings: EncodeConfig, workspace: Workspace) -> pa.Table:
    return pa.table({"encode_stub": ["x"] * len(rows)})


STAGE = Stage(
    name="encode",
    run=encode,
    config=EncodeConfig,
    adds=pa.schema([("encode_stub", pa.string())]),
    reads=("source_digest",),
    whole=False,
)
