"""Whether the disk holds the checkpoints of a run, asked before its first step."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sora_train.config.sections.outputs import CheckpointConfig
from sora_train.errors import UserError

MIB = 2**20


@dataclass(frozen=True)
class Space:
    """Bytes of one checkpoint, of all that will lie beside each other, and of what there is for them."""

    one: int
    together: int
    """`checkpoint.keep_last` and `keep_best` ones, and the one that is being written."""
    for_ever: int
    """Those of `checkpoint.keep_every`, by the end of the run."""
    available: int
    """Free on the disk, and taken by checkpoints of this run already."""

    def row(self) -> str:
        """For the card."""
        text = f"{self.one / MIB:,.0f} MiB each, {self.together / MIB:,.0f} MiB together"
        if self.for_ever:
            text += f", {self.for_ever / MIB:,.0f} MiB more by the end (checkpoint.keep_every)"
            if self.together + self.for_ever > self.available:
                text += ", which do not all fit"
        return f"{text}; {self.available / MIB:,.0f} MiB of disk for them"


def bytes_of(tensors: dict[str, Tensor]) -> int:
    """Of all ranks' parts together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def space_for(
    folder: Path, tensors: dict[str, Tensor], cfg: CheckpointConfig, first: int, last: int
) -> Space:
    """The room that saves from step `first` to step `last` take, and that there is."""
    one = bytes_of(tensors)
    saves = 1 + ((last - 1) // cfg.every - first // cfg.every if cfg.every else 0)
    side_by_side = min(max(1, saves), cfg.keep_last + cfg.keep_best + 1)
    eternal = last // cfg.keep_every - first // cfg.keep_every if cfg.keep_every else 0
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    taken = sum(path.stat().st_size for path in folder.glob("step-*/*") if path.is_file())
    free = shutil.disk_usage(place).free
    return Space(one, one * side_by_side, one * min(eternal, saves), free + taken)


def require_space(folder: Path, space: Space, cfg: CheckpointConfig) -> None:
    """Raises UserError where the disk would be full in the middle of the run."""
    if space.together <= space.available:
        return
    raise UserError(
        f"{folder} has {space.available / MIB:,.0f} MiB for checkpoints and needs {space.together / MIB:,.0f} MiB: "
        f"{space.one / MIB:,.1f} MiB each, checkpoint.keep_last={cfg.keep_last}, keep_best={cfg.keep_best} and one "
        "that is being written; lower checkpoint.keep_last, free space or set run.dir on a larger disk"
    )
