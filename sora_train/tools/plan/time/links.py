"""How long collectives take: which ranks of a group stand on one node, and what passes between nodes.

Ranks are numbered node by node, with `ulysses` fastest, then `ring`, `dp_shard`, `dp_replicate` (parallel/degrees.py).
A group of n ranks, g of them on each node, that gathers a tensor of V bytes brings (n - 1) / n of it to every rank
over the node's links, and (1 - g / n) of it into every node over the g adapters of its ranks; the slower counts.
"""

from collections import Counter
from dataclasses import dataclass

from sora_train.parallel.degrees import Degrees
from sora_train.tools.plan.assumptions import Assumptions
from sora_train.tools.plan.time.cluster import GB, Gpu


@dataclass(frozen=True)
class Group:
    """`size` ranks that stand `stride` apart."""

    size: int
    stride: int
    per_node: int
    """Of the group, on a node."""

    @classmethod
    def of(cls, size: int, stride: int, gpus_per_node: int) -> "Group":
        return cls(size, stride, max(1, min(size, gpus_per_node // stride)))

    @property
    def nodes(self) -> int:
        return -(-self.size // self.per_node)


@dataclass(frozen=True)
class Links:
    """Bandwidths in bytes a second that collectives reach, and seconds for each node they go through."""

    node: float
    network: float
    latency: float

    @classmethod
    def of(cls, gpu: Gpu, assume: Assumptions) -> "Links":
        reached = assume.network * GB
        return cls(gpu.nvlink_gb_s * reached, gpu.network_gb_s * reached, assume.latency_us * 1e-6)

    def gather(self, group: Group, size: float, calls: int = 1) -> float:
        """Seconds of all-gathers, or reduce-scatters, of tensors that are `size` bytes together."""
        if group.size == 1:
            return 0.0
        inside = size * (group.size - 1) / group.size / self.node if group.per_node > 1 else 0.0
        outside = size * (1 - group.per_node / group.size) / (group.per_node * self.network)
        return max(inside, outside) + calls * group.nodes * self.latency

    def exchange(self, group: Group, size: float, calls: int = 1) -> float:
        """Seconds of all-to-alls in which each rank has `size` bytes together."""
        if group.size == 1:
            return 0.0
        inside = size * (group.per_node - 1) / group.size / self.node
        outside = size * (group.size - group.per_node) / group.size / self.network
        return max(inside, outside) + calls * group.nodes * self.latency

    def pass_on(self, group: Group, size: float, calls: int = 1) -> float:
        """Seconds of sending `size` bytes to the next rank: all wait for the link between nodes, if there is one."""
        if group.size == 1:
            return 0.0
        speed = self.node if group.nodes == 1 else self.network
        return size / speed + calls * self.latency


@dataclass(frozen=True)
class Groups:
    """The groups of a layout."""

    shards: Group
    replicas: Group
    ulysses: Group
    ring: Group

    @classmethod
    def of(cls, degrees: Degrees, gpus_per_node: int) -> "Groups":
        def group(size: int, stride: int) -> Group:
            return Group.of(size, stride, gpus_per_node)

        return cls(
            group(degrees.shards, 1),
            group(degrees.dp_replicate, degrees.shards),
            group(degrees.ulysses, 1),
            group(degrees.ring, degrees.ulysses),
        )


def engine_seconds(
    volume: Counter[str], groups: Groups, links: Links, units: int, slots: int
) -> tuple[float, float]:
    """(seconds of gathering weights, seconds of reducing gradients) of a step with this volume.

    An all-reduce is a reduce-scatter and an all-gather. The engine's all-reduces are over replicas with FSDP2, over
    all ranks with ZeRO, which has no replicas.
    """
    over = groups.replicas if groups.replicas.size > 1 else groups.shards
    gathered = links.gather(groups.shards, volume["all_gather"], 2 * slots * units)
    reduced = links.gather(groups.shards, volume["reduce_scatter"], units)
    reduced += links.gather(over, 2 * volume["all_reduce"], 2 * units)
    return (
        gathered if volume["all_gather"] else 0.0,
        reduced if volume["reduce_scatter"] or volume["all_reduce"] else 0.0,
    )
