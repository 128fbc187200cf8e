"""The optimizer's state in the host's memory, for an engine whose weights stay on the device.

The device keeps the master weights, which the engine gathers from, and the gradients. A step brings both
to the host, updates there, and sends the weights back. The device's weights are the truth between steps,
so whatever changes them there (a checkpoint, an average that is swapped in) needs no telling.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sora_train.device.page_locked import locked


class HostCopies:
    """This rank's parts of the parameters on the host; in page-locked memory where they come from a GPU.

    Attributes:
        copies: parameter name -> what the optimizer is built on.
    """

    def __init__(self, shards: dict[str, nn.Parameter]):
        self.shards = shards
        self.copies = {
            name: nn.Parameter(_on_host(shard, self), requires_grad=shard.requires_grad)
            for name, shard in shards.items()
        }
        self._grads = {name: _on_host(shard, self) for name, shard in shards.items()}

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of `optimizer` (which is over `copies`) on the weights and gradients of the device."""
        for name, shard in self.shards.items():
            copy, grad = self.copies[name], self._grads[name]
            copy.grad = None
            if shard.grad is not None:
                copy.copy_(shard, non_blocking=True)
                copy.grad = grad.copy_(shard.grad, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        optimizer.step()
        for name, shard in self.shards.items():
            if shard.grad is not None:
                shard.copy_(self.copies[name], non_blocking=True)


def _on_host(shard: Tensor, owner: object) -> Tensor:
    if shard.is_cuda:
        return locked(owner, shard.shape, shard.dtype)
    return torch.zeros(shard.shape, dtype=shard.dtype)


def placed_on_host(part: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part, on the host, of a tensor that is sharded as `parameter` is; they share memory.

    Not `DTensor.from_local`, which would move it to the mesh's device.
    """
    if not isinstance(parameter, DTensor):
        return part
    return DTensor(part, parameter._spec, requires_grad=False)
