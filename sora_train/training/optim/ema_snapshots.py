"""Snapshots of the power-function averages, of which post-hoc EMA makes any other: `ema_snapshots/` in the run folder.

They are checkpoints of those averages alone, in 16 bits unless the config says otherwise, committed as
checkpoints are. A run that went back to an earlier step writes those behind it anew.
"""

import shutil
from pathlib import Path

import torch

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.layout import prefix_of
from sora_train.config import Config
from sora_train.parallel.shards import local, placed_as
from sora_train.training.optim.ema import Ema
from sora_train.training.run import RunContext

FOLDER = "ema_snapshots"


def snapshots_every(cfg: Config) -> int:
    """Steps between snapshots; 0: none. The last step's are in its checkpoint."""
    return (cfg.ema.snapshot_every or cfg.checkpoint.every) if cfg.ema.post_hoc else 0


def write_snapshot(run: RunContext, ema: Ema, step: int) -> None:
    """Save the averages of power-function profiles as they are at a step; a collective.

    Raises:
        Fault: the disk is full or the files cannot be written.
    """
    folder = run.folder.path / FOLDER
    dtype = getattr(torch, run.cfg.ema.snapshot_dtype)
    tensors = {
        f"{prefix_of(tag)}{name}": placed_as(local(shadow).to(dtype), shadow)
        for tag in ema.profiles
        for name, shadow in ema.shadows[tag].items()
    }
    state = {"step": step, "profiles": ema.profiles}
    with run.health.phase("save"):
        checkpoints.save(folder, step, tensors, state, run.control)
        if run.is_main:
            remove_after(folder, step)


def remove_after(folder: Path, step: int) -> None:
    """Remove snapshots of steps that the run has gone back behind: they are of another course of training."""
    for snapshot in checkpoints.list_checkpoints(folder):
        if snapshot.step > step:
            shutil.rmtree(snapshot.path)
