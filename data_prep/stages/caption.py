"""caption"""

from __future__ import annotations

import pyarrow as pa

from data_prep.stage import Stage, Workspace
from sora_train.config.sections.base import Section


class CaptionConfig(Section):
    """`caption:`"""


def caption(rows: pa.Table, settings: CaptionConfig, workspace: Workspace) -> pa.Table:
    return pa.table({"caption": rows["given_caption"], "captions": rows["given_captions"]})


STAGE = Stage(
    name="caption",
    run=caption,
    config=CaptionConfig,
    adds=pa.schema([("caption", pa.string()), ("captions", pa.string())]),
    reads=("given_caption", "given_captions"),
    whole=False,
)
