"""From a model without memory (`torch.device("meta")`) to this rank's shards of it, weight by weight.

Shards are made after the model is divided, and filled from whole values that exist one at a time: a rank
never holds more than its own part and one parameter.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sora_train.errors import Fault


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give the parameters of a meta model memory on `device`, in place and unfilled; shared ones stay shared, and those
    that have memory keep it."""
    buffers = [name for name, _ in model.named_buffers()]
    if buffers:
        raise Fault(
            f"the model has buffers ({', '.join(buffers[:3])}), which nothing fills; build it with its memory"
        )
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    # Swapped, a parameter stays the object that several modules may hold.
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        if all(parameter.device.type == "meta" for parameter in model.parameters()):
            model.to_empty(device=device)
        else:
            model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.detach())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)


@torch.no_grad()
def fill(weights: Mapping[str, Tensor], values: Iterable[tuple[str, Tensor]]) -> None:
    """Copy whole values, the same on every rank, into the weights of these names; without communication.

    Raises Fault unless they are the names of all weights.
    """
    left = dict(weights)
    for name, value in values:
        parameter = left.pop(name)
        if not isinstance(parameter, DTensor):
            parameter.copy_(value)
            continue
        own = distribute_tensor(
            value.to(parameter.to_local().device),
            parameter.device_mesh,
            parameter.placements,
            src_data_rank=None,
        )
        parameter.to_local().copy_(own.to_local())
    if left:
        raise Fault(f"no first value for {len(left)} parameters, {', '.join(list(left)[:5])}")
