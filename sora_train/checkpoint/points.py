"""Named points of a save at which a test can end this process or have the storage fail; nothing happens otherwise.

`SORA_TEST_SAVE=kill:after_shards` kills every rank that gets there, `fail:before_manifest` is a full
disk there; `kill:after_shards:1` is for rank 1 alone. A rehearsal has no points.
"""

import errno
import os
import signal
from pathlib import Path

from sora_train.checkpoint.layout import REHEARSAL

VARIABLE = "SORA_TEST_SAVE"
POINTS = (
    "after_copy",
    "after_shards",
    "before_manifest",
    "after_manifest",
    "between_renames",
    "after_rename",
    "before_latest",
)
"""In their order. The first two are reached by every rank, the others by rank 0."""


def reach(point: str, folder: Path, rank: int = 0) -> None:
    """This rank has come to `point` of a save into `folder`."""
    action, _, place = os.environ.get(VARIABLE, "").partition(":")
    if not action or folder.name == REHEARSAL:
        return
    named, _, only = place.partition(":")
    if named != point or (only and int(only) != rank):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "fail":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
