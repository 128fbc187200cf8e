"""Degrees of parallelism -> a DeviceMesh with named axes."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sora_train.config import ParallelConfig
from sora_train.parallel.degrees import resolve_degrees
from sora_train.runtime.world import World, set_timeout


def build_mesh(cfg: ParallelConfig, world: World) -> DeviceMesh:
    """Axes `dp_replicate` and `fsdp`, over which weights are split: dp_shard and context parallelism together.

    One rank is the single process; (N, 1) is DDP. Without replicas the mesh has the axis `fsdp` alone.
    """
    degrees = resolve_degrees(cfg, world.size)
    shape = (degrees.dp_replicate, degrees.dp_shard * degrees.cp)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("dp_replicate", "fsdp"))
    for group in mesh.get_all_groups():
        set_timeout(world.timeout, group)
    return mesh if degrees.dp_replicate > 1 else mesh["fsdp"]
