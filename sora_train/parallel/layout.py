"""How a run lies over its ranks, resolved once and passed on: degrees, the dtype of compute, and process groups."""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sora_train.parallel.context.context import ContextGroups
from sora_train.parallel.degrees import Degrees
from sora_train.runtime.world import World, set_timeout


@dataclass(frozen=True)
class Layout:
    degrees: Degrees
    param_dtype: torch.dtype
    """The dtype in which weights compute; masters are float32."""
    context: ContextGroups | None = None
    """This rank's groups of context parallelism; None where `degrees.cp` is 1."""


def build_mesh(degrees: Degrees, world: World) -> DeviceMesh:
    """Axes `dp_replicate` and `fsdp`, over which weights are split: dp_shard and context parallelism together.

    One rank is the single process; (N, 1) is DDP. Without replicas the mesh has the axis `fsdp` alone.
    """
    shape = (degrees.dp_replicate, degrees.shards)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("dp_replicate", "fsdp"))
    for group in mesh.get_all_groups():
        set_timeout(world.timeout, group)
    return mesh if degrees.dp_replicate > 1 else mesh["fsdp"]
