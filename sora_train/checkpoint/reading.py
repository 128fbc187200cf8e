"""Reading a checkpoint: its files are what the manifest says, and its tensors are just those that are asked for.

Strict both ways, since DCP itself ignores keys that were not asked for.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from sora_train.checkpoint.commit import sha256
from sora_train.checkpoint.layout import Checkpoint, listed_files
from sora_train.errors import Fault, UserError
from sora_train.runtime.control_plane import ControlPlane


def load(
    checkpoint: Checkpoint,
    tensors: dict[str, Tensor],
    control: ControlPlane | None,
    *,
    verified: bool = False,
) -> None:
    """Fill `tensors` in place, at any world size; the ranks share the reading for the digests.

    `verified`: the caller has compared the digests already.

    Raises:
        UserError: a key is missing, left over or of another shape: it is a checkpoint of another model.
        Fault: a file does not match its digest.
    """
    if verified:
        pass
    elif control is None:
        verify(checkpoint)
    else:
        world = control.world
        why = damaged(checkpoint, part=world.rank, parts=world.size)
        control.raise_together(_damage(why) if why else None)
    reader = FileSystemReader(checkpoint.path)
    stored = reader.read_metadata().state_dict_metadata
    require_same(checkpoint, stored, tensors)
    dcp.load(tensors, storage_reader=reader, process_group=control.group if control else None)


def load_part(checkpoint: Checkpoint, tensors: dict[str, Tensor], prefix: str) -> None:
    """Fill `tensors`, which are all there is under `prefix` (`model.`, `ema.`), in one process; as strict as `load`."""
    verify(checkpoint)
    require_part(checkpoint, tensors, prefix)
    load_some(checkpoint, tensors)


def load_some(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors`, some of those of a checkpoint whose files and names were compared before, in one process."""
    reader = FileSystemReader(checkpoint.path)
    with warnings.catch_warnings():
        # torch warns of every load in a process without a group, and here there is none on purpose.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)


def require_part(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Raises UserError unless `tensors` are, by name and shape, all there is under `prefix`."""
    stored = FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata
    part = {name: entry for name, entry in stored.items() if name.startswith(prefix)}
    require_same(checkpoint, part, tensors)


def verify(checkpoint: Checkpoint) -> None:
    """Compare every file with the manifest's digest. Raises Fault naming the damaged one."""
    why = damaged(checkpoint)
    if why:
        raise _damage(why)


def damaged(checkpoint: Checkpoint, part: int = 0, parts: int = 1) -> str:
    """Which of the files of a part, dealt out over `parts`, does not match its digest, or an empty string."""
    files = listed_files(checkpoint.path)
    for name, entry in list(files.items())[part::parts]:
        path = checkpoint.path / name
        if not path.is_file():
            return f"{path} is missing"
        if sha256(path) != entry["sha256"]:
            return f"{path} does not match its digest; the file is damaged"
    return ""


def _damage(why: str) -> Fault:
    return Fault(f"{why}, remove this checkpoint to go on from the one before")


def require_same(
    checkpoint: Checkpoint, stored: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Raises UserError unless names and shapes are the same on both sides."""
    missing = sorted(set(tensors) - set(stored))
    surplus = sorted(set(stored) - set(tensors))
    shapes = [
        f"{name} is {tuple(stored[name].size)}, the model's is {tuple(tensors[name].shape)}"
        for name in sorted(set(tensors) & set(stored))
        if tuple(stored[name].size) != tuple(tensors[name].shape)
    ]
    if missing or surplus or shapes:
        parts = [
            f"{len(missing)} tensors missing ({', '.join(missing[:10])}...)" if missing else "",
            f"{len(surplus)} left over ({', '.join(surplus[:10])}...)" if surplus else "",
            f"{len(shapes)} of another shape ({'; '.join(shapes[:10])})" if shapes else "",
        ]
        raise UserError(
            f"{checkpoint.path} is a checkpoint of another model: "
            f"{', '.join(part for part in parts if part)}; use its own config or another run.dir"
        )
