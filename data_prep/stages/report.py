"""report"""

from __future__ import annotations

import pyarrow as pa

from data_prep.stage import Stage, Workspace
from sora_train.config.sections.base import Section


class ReportConfig(Section):
    """`report:`"""


def report(rows: pa.Table, settings: ReportConfig, workspace: Workspace) -> pa.Table:
    return pa.table({"report_stub": ["x"] * len(rows)})


STAGE = Stage(
    name="report",
    run=report,
    config=ReportConfig,
    adds=pa.schema([("report_stub", pa.string())]),
    reads=("source_digest",),
    whole=True,
)
