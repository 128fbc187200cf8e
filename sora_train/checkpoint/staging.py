"""Host memory of our own into which a checkpoint's tensors are copied, so that training goes on while they are written.

It is allocated once and every page of it is written to before the first save: a first copy into fresh
memory takes as long as a save does. On a GPU its pages are locked, and the copy runs on a stream of its
own beside the next forward and backward pass, which only read weights; what writes them waits for it.
"""

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

from sora_train.checkpoint.layout import Checkpoint
from sora_train.device.page_locked import locked
from sora_train.errors import Fault
from sora_train.parallel.shards import FlatShard, piece
from sora_train.runtime.control_plane import ControlPlane


class Staging:
    """Buffers for this rank's parts of `tensors`, each with the part's shape and type."""

    def __init__(self, tensors: dict[str, Tensor]):
        with torch.no_grad():
            self.buffers = {name: self._buffer(part_of(tensor)) for name, tensor in tensors.items()}
        devices = {part_of(tensor).device for tensor in tensors.values()}
        cuda = [device for device in devices if device.type == "cuda"]
        self._stream = torch.cuda.Stream(cuda[0]) if cuda else None
        self._copied = torch.cuda.Event() if cuda else None

    @property
    def bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers.values())

    def fits(self, tensors: dict[str, Tensor]) -> bool:
        """Whether names, shapes and types are those of the buffers."""
        parts = {name: part_of(tensor) for name, tensor in tensors.items()}
        return parts.keys() == self.buffers.keys() and all(
            part.shape == self.buffers[name].shape and part.dtype == self.buffers[name].dtype
            for name, part in parts.items()
        )

    @torch.no_grad()
    def copy(self, tensors: dict[str, Tensor]) -> None:
        """Take this moment's values. On a GPU neither the host nor the device waits; `wait` and `let_write` do."""
        parts = [part_of(tensors[name]) for name in self.buffers]
        buffers = list(self.buffers.values())
        if self._stream is None or self._copied is None:
            torch._foreach_copy_(buffers, parts)
            return
        training = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(training)
        with torch.cuda.stream(self._stream):
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part, non_blocking=True)
                if part.is_cuda:
                    part.record_stream(self._stream)
            self._copied.record(self._stream)

    def let_write(self) -> None:
        """What is queued on the device from now on may change the tensors."""
        if self._stream is not None and self._copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)

    def wait(self) -> None:
        """Until the copy is done; to be called before a buffer is read, from any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def _buffer(self, part: Tensor) -> Tensor:
        # Rows as they are counted, whatever the order in memory of the original: it is what is written.
        if part.is_cuda:
            return locked(self, part.shape, part.dtype)
        return torch.empty(part.shape, dtype=part.dtype).zero_()

    def read(self, name: str) -> Tensor:
        return self.buffers[name]

    @torch.no_grad()
    def read_back(
        self, checkpoint: Checkpoint, tensors: dict[str, Tensor], control: ControlPlane
    ) -> None:
        """Load a checkpoint of `tensors` into the buffers and compare.

        Raises:
            Fault: what was loaded is something else; on all ranks.
        """
        for buffer in self.buffers.values():
            buffer.zero_()
        planner = _IntoBuffers(self.buffers)
        reader = FileSystemReader(checkpoint.path)
        dcp.load(dict(tensors), storage_reader=reader, planner=planner, process_group=control.group)
        wrong = [
            name
            for name, buffer in self.buffers.items()
            if not torch.equal(buffer.view(-1), part_of(tensors[name]).cpu().reshape(-1))
        ]
        error = Fault(f"{checkpoint.path}: {wrong[0]} is not what was saved") if wrong else None
        control.raise_together(error)


class _IntoBuffers(DefaultLoadPlanner):
    """Plans with the live tensors and writes to their buffers."""

    def __init__(self, buffers: dict[str, Tensor]):
        super().__init__()
        self.buffers = buffers

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return piece(self.state_dict[index.fqn], self.buffers[index.fqn], index)


def part_of(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with the tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor | FlatShard) else tensor).detach()
