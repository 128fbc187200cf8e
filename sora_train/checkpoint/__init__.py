"""One canonical checkpoint, whatever the engine: DCP shards keyed by parameter name, plus one JSON.

`layout` says what lies where and what is whole, `commit` how a folder becomes a checkpoint, `saving` and
`reading` what is in it, `saver` how a run saves without waiting, `retention` what stays, `space` whether
there is room, and `remote` how all that goes to an object store.
"""

from sora_train.checkpoint.layout import (
    LATEST,
    MANIFEST,
    STATE,
    Checkpoint,
    complete,
    find,
    list_checkpoints,
    why_incomplete,
)
from sora_train.checkpoint.reading import damaged, load, load_part, load_some, require_part, verify
from sora_train.checkpoint.retention import prune
from sora_train.checkpoint.saving import canonical, save, save_streamed, state_versions

__all__ = [
    "LATEST",
    "MANIFEST",
    "STATE",
    "Checkpoint",
    "canonical",
    "complete",
    "damaged",
    "find",
    "list_checkpoints",
    "load",
    "load_part",
    "load_some",
    "prune",
    "require_part",
    "save",
    "save_streamed",
    "state_versions",
    "verify",
    "why_incomplete",
]
