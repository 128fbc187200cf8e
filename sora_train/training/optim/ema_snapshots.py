"""Snapshots of the power-function averages, of which post-hoc EMA makes any other: `ema_snapshots/` in the run folder.

They are checkpoints of those averages alone, in 16 bits unless the config says otherwise, committed as
checkpoints are. A run that went back to an earlier step writes those behind it anew.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.layout import prefix_of
from sora_train.config import Config
from sora_train.parallel.shards import local, placed_as

if TYPE_CHECKING:
    from sora_train.training.trainer import Trainer

FOLDER = "ema_snapshots"


def snapshots_every(cfg: Config) -> int:
    """Steps between snapshots; 0: none. The last step's are in its checkpoint."""
    return (cfg.ema.snapshot_every or cfg.checkpoint.every) if cfg.ema.post_hoc else 0


def write_snapshot(trainer: "Trainer") -> None:
    """Every rank calls this.

    Raises:
        Fault: the disk is full or the files cannot be written.
    """
    ema, folder = trainer.ema, trainer.folder.path / FOLDER
    dtype = getattr(torch, trainer.cfg.ema.snapshot_dtype)
    tensors = {
        f"{prefix_of(tag)}{name}": placed_as(local(shadow).to(dtype), shadow)
        for tag in ema.profiles
        for name, shadow in ema.shadows[tag].items()
    }
    state = {"step": trainer.step, "profiles": ema.profiles}
    with trainer.health.phase("save"):
        checkpoints.save(folder, trainer.step, tensors, state, trainer.control)
        if trainer.world.is_main:
            remove_after(folder, trainer.step)


def remove_after(folder: Path, step: int) -> None:
    """Remove snapshots of steps that the run has gone back behind: they are of another course of training."""
    for snapshot in checkpoints.list_checkpoints(folder):
        if snapshot.step > step:
            shutil.rmtree(snapshot.path)
