"""The folder beside a long video in which finished windows wait, so that a killed job goes on from the last of them."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sora_train.base.files import renamed_when_whole
from sora_train.errors import Fault

DIGITS = 12
"""Of a request's digest, in the folder's name."""


class Store:
    """Latents of finished windows by name, whole files only.

    Its folder is named by a digest of the request, so another request never meets them.
    """

    def __init__(self, beside: Path, request: dict[str, Any], *, writes: bool = True):
        """`writes`: whether this process keeps what is made; of those that make it together one does."""
        self.writes = writes
        text = json.dumps(request, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.folder = beside / f".unfinished-{digest[:DIGITS]}"

    def finished(self) -> int:
        """How many windows are there."""
        return sum(1 for _ in self.folder.glob("*.npy"))

    def latents(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The latents of a window, made and kept unless they are there."""
        path = self.folder / f"{name}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path))
        made = make().float().cpu()
        if not self.writes:
            return made
        try:
            with renamed_when_whole(path) as partial, partial.open("wb") as file:
                np.save(file, made.numpy())
        except OSError as error:
            raise self.full(error) from error
        return made

    def full(self, error: OSError) -> Fault:
        """What to say where the disk takes no more."""
        return Fault(
            f"cannot write beside {self.folder.parent}: {error.strerror or error}; {self.finished()} finished windows "
            f"are kept in {self.folder}: free space and give the same command again, which goes on from them"
        )

    def remove(self) -> None:
        """The video is whole, so nothing is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)
