"""Degrees of parallelism -> a DeviceMesh with named axes."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sora_train.config import ParallelConfig
from sora_train.distributed import World
from sora_train.errors import ConfigError


def resolve_degrees(cfg: ParallelConfig, world_size: int) -> tuple[int, int]:
    """(dp_replicate, dp_shard) with -1 filled in.

    Raises:
        ConfigError: the product of the degrees is not the number of ranks.
    """
    shard = cfg.dp_shard if cfg.dp_shard != -1 else max(1, world_size // cfg.dp_replicate)
    if cfg.dp_replicate * shard != world_size:
        raise ConfigError(
            f"parallel degrees do not fill the job: parallel.dp_replicate {cfg.dp_replicate} x "
            f"parallel.dp_shard {shard} = {cfg.dp_replicate * shard}, but {world_size} rank(s) are "
            f"running; set parallel.dp_shard=-1 or start {cfg.dp_replicate * shard} ranks"
        )
    return cfg.dp_replicate, shard


def build_mesh(cfg: ParallelConfig, world: World) -> DeviceMesh:
    """Axes `dp_replicate`, `dp_shard`. One rank is the single process; (N, 1) is DDP."""
    degrees = resolve_degrees(cfg, world.size)
    mesh = init_device_mesh(world.device.type, degrees, mesh_dim_names=("dp_replicate", "dp_shard"))
    return mesh if degrees[0] > 1 else mesh["dp_shard"]
