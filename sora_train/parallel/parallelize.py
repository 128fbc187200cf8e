"""Turns a plain model into a sharded one. The only file that knows both the model's blocks and the mesh."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


def transformers_of(model: nn.Module) -> list[nn.Module]:
    """The transformers of a model, one or two, or the model itself."""
    parts = (getattr(model, name, None) for name in ("transformer", "transformer_2"))
    return [part for part in parts if part is not None] or [model]


def sharding_units(model: nn.Module) -> list[nn.Module]:
    """Sub-modules gathered one at a time: the transformers' blocks, where the model has any."""
    return [block for part in transformers_of(model) for block in getattr(part, "blocks", ())]


def apply_fsdp(model: nn.Module, mesh: DeviceMesh, param_dtype: torch.dtype) -> nn.Module:
    """Shard every block on its own, then whatever is left in the root, in place.

    Inputs are not cast: a timestep of 997.3 would become 996 in bfloat16. Gradients are summed,
    never averaged (gloo has no pre-multiplied sum, and the loss is scaled by the step's true weight
    before backward), and travel in float32. On one rank there is nothing to gather or sum, and the
    model stays as it is: FSDP2 would cast and copy every weight and gradient twice.
    """
    if mesh.size() == 1:
        return model
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=torch.promote_types(param_dtype, torch.float32),
        cast_forward_inputs=False,
    )
    for unit in [*sharding_units(model), model]:
        # The root is resharded too, so that between steps every parameter is its sharded self.
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model
