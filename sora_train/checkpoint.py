"""One canonical checkpoint, whatever the engine: DCP shards keyed by parameter name, plus one JSON.

    checkpoints/step-000500/   model.* optim.* ema.* in DCP's format
                               state.json     step, samples seen, config, diffusion spec, versions
                               MANIFEST.json  every file with its size and SHA-256, written last
    checkpoints/latest         the name of the newest complete one

A save goes to `step-N.tmp` and is renamed when its manifest is on disk, so a folder under its final
name is whole. Loading is strict both ways, since DCP itself ignores keys nobody asked for.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from sora_train.distributed import ControlPlane
from sora_train.errors import Fault, UserError

STATE, MANIFEST, LATEST = "state.json", "MANIFEST.json", "latest"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def state(self) -> dict[str, Any]:
        return json.loads((self.path / STATE).read_text())


def complete(path: Path) -> bool:
    """Whether the manifest is there and every file it lists has the size it says."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return False
    files = json.loads(manifest.read_text())["files"]
    return all(
        (path / name).is_file() and (path / name).stat().st_size == entry["size"]
        for name, entry in files.items()
    )


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """Complete checkpoints, oldest first; a torn one is not listed."""
    found = [
        Checkpoint(path, int(path.name.removeprefix("step-")))
        for path in folder.glob("step-*")
        if path.name.removeprefix("step-").isdigit() and complete(path)
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def find(run_dir: Path, step: int | None = None) -> Checkpoint:
    """The newest complete checkpoint of a run, or the one of `step`.

    Raises:
        UserError: the folder is no run, or has no such checkpoint.
    """
    found = list_checkpoints(run_dir / "checkpoints")
    if not found:
        raise UserError(
            f"{run_dir} holds no complete checkpoint; give a run folder that `sora train` has written"
        )
    if step is None:
        return found[-1]
    for checkpoint in found:
        if checkpoint.step == step:
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in found)
    raise UserError(f"{run_dir} has no checkpoint of step {step}; it has {steps}")


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    control: ControlPlane,
) -> Checkpoint:
    """Write a checkpoint of `step`; every rank calls this, rank 0 commits.

    Raises:
        Fault: the disk is full or the files cannot be written; nothing is left under the final name.
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f"step-{step:06d}.tmp"
    error: Exception | None = None
    if control.world.is_main:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as failure:
            error = Fault(
                f"cannot write the checkpoint {temporary}: {failure.strerror}; free space or set run.dir"
            )
    control.raise_together(error)
    try:
        dcp.save(tensors, storage_writer=FileSystemWriter(temporary), process_group=control.group)
        if control.world.is_main:
            _commit(temporary, final, state)
    except (OSError, CheckpointException) as failure:
        error = Fault(
            f"cannot write the checkpoint {final}: {_why(failure, folder)}; free space or set run.dir"
        )
        if control.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
    control.raise_together(error)
    return Checkpoint(final, step)


def save_streamed(
    folder: Path,
    step: int,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    state: dict[str, Any],
) -> Checkpoint:
    """Write a checkpoint of float32 tensors in one process, each read when it is written.

    Args:
        read: the value of a name of `shapes`; asked for in their order.

    Raises:
        Fault: the disk is full or the files cannot be written; nothing is left under the final name.
    """
    final, temporary = folder / f"step-{step:06d}", folder / f"step-{step:06d}.tmp"
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        temporary.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            writer = FileSystemWriter(temporary)
            dcp.save(tensors, storage_writer=writer, planner=_ReadWhenWritten(read), no_dist=True)
        _commit(temporary, final, state)
    except (OSError, CheckpointException) as failure:
        shutil.rmtree(temporary, ignore_errors=True)
        raise Fault(
            f"cannot write the checkpoint {final}: {_why(failure, folder)}; free space or choose another disk"
        ) from failure
    return Checkpoint(final, step)


class _ReadWhenWritten(DefaultSavePlanner):
    """Plans with tensors without memory; their values come when DCP writes them, one at a time."""

    def __init__(self, read: Callable[[str], Tensor]):
        super().__init__()
        self.read = read

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.read(index.fqn)


def _why(failure: OSError | CheckpointException, folder: Path) -> str:
    """One line; torch tells of a full disk in many ways, so the space left is said beside them."""
    causes = (
        [failure]
        if isinstance(failure, OSError)
        else [cause for cause, _ in failure.failures.values()]
    )
    for cause in causes:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    free = shutil.disk_usage(folder).free / 2**20
    return f"{type(causes[0]).__name__}, with {free:,.0f} MiB free on its disk"


def _commit(temporary: Path, final: Path, state: dict[str, Any]) -> None:
    _write(temporary / STATE, json.dumps(state, indent=1))
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(temporary.iterdir())
    }
    _write(temporary / MANIFEST, json.dumps({"files": files}, indent=1))
    if final.exists():
        shutil.rmtree(final)
    temporary.replace(final)
    pointer = final.parent / (LATEST + ".tmp")
    _write(pointer, final.name)
    pointer.replace(final.parent / LATEST)


def load(checkpoint: Checkpoint, tensors: dict[str, Tensor], control: ControlPlane | None) -> None:
    """Fill `tensors` in place, at any world size.

    Raises:
        UserError: a key is missing, left over or of another shape: it is a checkpoint of another model.
        Fault: a file does not match its digest.
    """
    verify(checkpoint)
    reader = FileSystemReader(checkpoint.path)
    stored = reader.read_metadata().state_dict_metadata
    _require_same(checkpoint, stored, tensors)
    dcp.load(tensors, storage_reader=reader, process_group=control.group if control else None)


def load_part(checkpoint: Checkpoint, tensors: dict[str, Tensor], prefix: str) -> None:
    """Fill `tensors`, which are all there is under `prefix` (`model.`, `ema.`), in one process; as strict as `load`."""
    verify(checkpoint)
    reader = FileSystemReader(checkpoint.path)
    stored = reader.read_metadata().state_dict_metadata
    part = {name: entry for name, entry in stored.items() if name.startswith(prefix)}
    _require_same(checkpoint, part, tensors)
    with warnings.catch_warnings():
        # Said of every load in a process without a group, which is what is meant here.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)


def verify(checkpoint: Checkpoint) -> None:
    """Compare every file with the manifest's digest."""
    files = json.loads((checkpoint.path / MANIFEST).read_text())["files"]
    for name, entry in files.items():
        if _sha256(checkpoint.path / name) != entry["sha256"]:
            raise Fault(
                f"{checkpoint.path / name} does not match its digest; the file is damaged, "
                "remove this checkpoint to go on from the one before"
            )


def _require_same(
    checkpoint: Checkpoint, stored: dict[str, Any], wanted: dict[str, Tensor]
) -> None:
    missing = sorted(set(wanted) - set(stored))
    surplus = sorted(set(stored) - set(wanted))
    shapes = [
        f"{name} is {tuple(stored[name].size)}, the model's is {tuple(wanted[name].shape)}"
        for name in sorted(set(wanted) & set(stored))
        if tuple(stored[name].size) != tuple(wanted[name].shape)
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


def prune(folder: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` complete checkpoints, and leftovers of torn saves."""
    for checkpoint in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(checkpoint.path)
    for torn in folder.glob("step-*.tmp"):
        shutil.rmtree(torn)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def canonical(
    model: dict[str, Tensor], optimizer: dict[str, Tensor], ema: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The flat name space of a checkpoint."""
    named = {f"model.{name}": tensor for name, tensor in model.items()}
    named |= {f"optim.{name}": tensor for name, tensor in optimizer.items()}
    named |= {f"ema.{name}": tensor for name, tensor in ema.items()}
    return named


def state_versions() -> dict[str, str]:
    return {"torch": torch.__version__}
