"""fingerprint"""

from __future__ import annotations

import pyarrow as pa

from data_prep.stage import Stage, Workspace
from sora_train.config.sections.base import Section


class FingerprintConfig(Section):
    """`fingerprint:`"""


def fingerprint(rows: pa.Table, settings: FingerprintConfig, workspace: Workspace) -> pa.Table:
    return pa.table({"fingerprint_stub": ["x"] * len(rows)})


STAGE = Stage(
    name="fingerprint",
    run=fingerprint,
    config=FingerprintConfig,
    adds=pa.schema([("fingerprint_stub", pa.string())]),
    reads=("source_digest",),
    whole=False,
)
