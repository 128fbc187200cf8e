"""caption"""

from __future__ import annotations

import pyarrow as pa

from data_prep.stage import Stage, Workspace
from sora_train.config.sections.base import Section


class CaptionConfig(Section):
    """`caption:`"""


def caption(rows: pa.Table, settings: CaptionConfig, workspace: Workspace) -> pa.Table:
    return pa.table({"caption_stub": ["x"] * len(rows)})


STAGE = Stage(
    name="caption",
    run=caption,
    config=CaptionConfig,
    adds=pa.schema([("caption_stub", pa.string())]),
    reads=("source_digest",),
    whole=False,
)
