"""The tensors of a checkpoint by name, read one at a time: what tools need that never hold a whole model."""

import math
import warnings
from collections.abc import Iterator

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sora_train import checkpoint as checkpoints
from sora_train.checkpoint.layout import EMA_PREFIX, prefix_of, tag_of
from sora_train.errors import UserError

LIVE = "model."
CHUNK = 1 << 22
"""Values of a tensor looked at together in float64."""


class StoredTensors:
    """What lies in a checkpoint.

    Attributes:
        shapes, dtypes: of every tensor by its whole name, in the checkpoint's order.
    """

    def __init__(self, checkpoint: checkpoints.Checkpoint):
        self.checkpoint = checkpoint
        self._reader = _OnceReader(checkpoint.path)
        entries = self._reader.read_metadata().state_dict_metadata
        tensors = {
            name: entry
            for name, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {name: tuple(entry.size) for name, entry in tensors.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in tensors.items()}

    def names(self, prefix: str) -> list[str]:
        """What is left of the names that begin with `prefix`."""
        return [name.removeprefix(prefix) for name in self.shapes if name.startswith(prefix)]

    def bytes_of(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def read(self, *names: str) -> dict[str, Tensor]:
        """Tensors of these whole names, each whole and in memory of its own, as they are stored."""
        tensors = {name: torch.empty(self.shapes[name], dtype=self.dtypes[name]) for name in names}
        with warnings.catch_warnings():
            # torch warns of every load in a process without a group, and here there is none on purpose.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(tensors, storage_reader=self._reader, no_dist=True)
        return tensors

    def prefix(self, weights: str) -> str:
        """What names of `live` weights, of `ema` or of another average begin with; `0.9999` is the tag `9999` too.

        Raises:
            UserError: the checkpoint has no such average.
        """
        if weights == "live":
            return LIVE
        tag = "" if weights == EMA_PREFIX else weights.removeprefix(f"{EMA_PREFIX}_")
        tags = {
            name.partition(".")[0].removeprefix(EMA_PREFIX).removeprefix("_")
            for name in self.shapes
            if name.partition(".")[0].partition("_")[0] == EMA_PREFIX
        }
        for candidate in (tag, *_tags_of_number(tag)):
            if candidate in tags:
                return prefix_of(candidate)
        available = ", ".join(["live", *(prefix_of(stored)[:-1] for stored in sorted(tags))])
        raise UserError(
            f"{self.checkpoint.path} has no average '{weights}' of its weights; it has {available}"
        )


def _tags_of_number(text: str) -> list[str]:
    """The tags that a decay or a sigma_rel may stand for."""
    try:
        value = float(text)
    except ValueError:
        return []
    return [tag_of(value), tag_of(value, "s")] if 0 <= value < 1 else []


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape side by side in float64, a few million values at a time."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for first in range(0, flat[0].numel(), CHUNK):
        yield tuple(part[first : first + CHUNK].to(torch.float64) for part in flat)


class _OnceReader(FileSystemReader):
    """Reads the list of what is stored once, not again for every tensor."""

    _known: Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        if self._known is None:
            self._known = super().read_metadata()
        return self._known
