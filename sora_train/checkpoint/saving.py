"""Writing a checkpoint: DCP's shards keyed by parameter name, whatever the engine, then the commit.

Every step of the way that one rank can fail in ends with all ranks knowing it, so none waits for another.
"""

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from sora_train.checkpoint.commit import Files, begin, commit, digests, written_by
from sora_train.checkpoint.layout import TEMPORARY, Checkpoint, name_of
from sora_train.checkpoint.points import reach
from sora_train.diffusion.draws import DRAWS
from sora_train.errors import Fault
from sora_train.parallel.shards import piece
from sora_train.runtime.control_plane import ControlPlane


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
    return write(folder, step, tensors, json.dumps(state, indent=1), control)


def write(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    state: str,
    control: ControlPlane,
    read: Callable[[str], Tensor] | None = None,
) -> Checkpoint:
    """As `save`, of a state that is JSON already.

    Args:
        read: this rank's part of a tensor, by name, where `tensors` says shapes and placements alone.
    """
    rank, is_main = control.world.rank, control.world.is_main
    final = folder / name_of(step)
    temporary = folder / (name_of(step) + TEMPORARY)

    def together(work: Callable[[], object]) -> None:
        """Do work that may fail on one rank; then it fails on all ranks."""
        error: Exception | None = None
        try:
            work()
        except (OSError, CheckpointException) as failure:
            error = cannot_write(final, failure)
        errors = [str(text) for text in control.gather_objects(str(error or ""))]
        if not any(errors):
            return
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        # Every rank names the reason: the process of the rank that failed may end before it prints.
        failed = next(rank for rank, text in enumerate(errors) if text)
        raise error or Fault(f"rank {failed} {errors[failed]}")

    def shards() -> None:
        dcp.save(
            tensors,
            storage_writer=FileSystemWriter(temporary),
            planner=_ReadWhenWritten(read) if read else None,
            process_group=control.group,
        )
        reach("after_shards", folder, rank)

    together(lambda: begin(temporary) if is_main else None)
    together(shards)
    files: Files = {}
    together(lambda: files.update(digests(written_by(rank, temporary))))
    for of_rank in control.gather_objects(files):
        assert isinstance(of_rank, dict)
        files |= of_rank
    together(lambda: commit(temporary, final, state, files) if is_main else None)
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
    final, temporary = folder / name_of(step), folder / (name_of(step) + TEMPORARY)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        begin(temporary)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            # Copying ahead would ask for a tensor before the one before it is written.
            writer = FileSystemWriter(temporary, per_thread_copy_ahead=0)
            planner = _ReadWhenWritten(read, max(map(math.prod, shapes.values())))
            dcp.save(tensors, storage_writer=writer, planner=planner, no_dist=True)
        commit(temporary, final, json.dumps(state, indent=1), {})
    except (OSError, CheckpointException) as failure:
        shutil.rmtree(temporary, ignore_errors=True)
        raise Fault(
            f"cannot write the checkpoint {final}: {_why(failure, folder)}; free space or choose another disk"
        ) from failure
    return Checkpoint(final, step)


class _ReadWhenWritten(DefaultSavePlanner):
    """Plans with tensors whose values are elsewhere; those come when DCP writes them, one at a time.

    With `largest`, the most values that one of them has, all share one piece of memory, one after the
    other: DCP keeps every tensor until its file is closed, and a freed one of some megabytes leaves a
    hole that nothing fits in.
    """

    def __init__(self, read: Callable[[str], Tensor], largest: int = 0):
        super().__init__()
        self.read = read
        self.memory = np.empty(largest, np.float32)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        value = self.read(index.fqn)
        if not len(self.memory):
            return piece(self.state_dict[index.fqn], value, index)
        shared = torch.from_numpy(self.memory[: value.numel()]).view(value.shape)
        return shared.copy_(value)


def cannot_write(final: Path, failure: OSError | CheckpointException) -> Fault:
    """The sentence of a save that the storage did not take."""
    return Fault(
        f"cannot write the checkpoint {final}: {_why(failure, final.parent)}; free space or set run.dir, "
        "the checkpoint before it is whole"
    )


def _why(failure: OSError | CheckpointException, folder: Path) -> str:
    """One line; torch reports a full disk in many ways, so the free space is added."""
    causes = (
        [failure]
        if isinstance(failure, OSError)
        else [cause for cause, _ in failure.failures.values()]
    )
    for cause in causes:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    place = folder if folder.is_dir() else folder.parent
    free = shutil.disk_usage(place).free / 2**20
    return f"{type(causes[0]).__name__}, with {free:,.0f} MiB free on its disk"


def canonical(
    model: dict[str, Tensor], optimizer: dict[str, Tensor], ema: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The flat name space of a checkpoint."""
    named = {f"model.{name}": tensor for name, tensor in model.items()}
    named |= {f"optim.{name}": tensor for name, tensor in optimizer.items()}
    named |= {f"ema.{name}": tensor for name, tensor in ema.items()}
    return named


def state_versions() -> dict[str, str]:
    """What numbers depend on beside the code: the version of torch, and the generator of all draws."""
    return {"torch": torch.__version__, "draws": DRAWS}
