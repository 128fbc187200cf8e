"""score"""

from __future__ import annotations

import pyarrow as pa

from data_prep.stage import Stage, Workspace
from sora_train.config.sections.base import Section


class ScoreConfig(Section):
    """`score:`"""


def score(rows: pa.Table, settings: ScoreConfig, workspace: Workspace) -> pa.Table:
    return pa.table({"score_stub": ["x"] * len(rows)})


STAGE = Stage(
    name="score",
    run=score,
    config=ScoreConfig,
    adds=pa.schema([("score_stub", pa.string())]),
    reads=("source_digest",),
    whole=False,
)
