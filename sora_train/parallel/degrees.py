"""Degrees of parallelism: how many ranks each axis has, and whether a model and a job fit them. No torch is needed."""

import math
from dataclasses import dataclass
from typing import get_args

from sora_train.config import Config, ParallelConfig
from sora_train.config.sections.model import Attention
from sora_train.errors import ConfigError

GIVE_NO_LSE = ("cudnn", "varlen", "flash2", "flash3", "flash4")
"""Values of model.attention that a ring cannot use: each part's log-sum-exp is needed to merge it with the others."""


@dataclass(frozen=True)
class Degrees:
    """How many ranks each axis has; their product is the world.

    Ranks are numbered with `ulysses` fastest, then `ring`, `dp_shard`, `dp_replicate`: those that talk most
    are neighbours, on one node where that can be.
    """

    dp_replicate: int
    dp_shard: int
    ulysses: int
    ring: int

    @property
    def cp(self) -> int:
        """Ranks that share the tokens of one micro-batch."""
        return self.ulysses * self.ring

    @property
    def shards(self) -> int:
        """Neighbouring ranks over which one replica's weights are split."""
        return self.dp_shard * self.cp

    def place_of(self, rank: int) -> str:
        """Where a rank stands on the axes that have more than one place: `dp_shard 1, ulysses 0`."""
        found = {}
        for name in ("ulysses", "ring", "dp_shard", "dp_replicate"):
            rank, found[name] = divmod(rank, getattr(self, name))
        return ", ".join(
            f"{name} {found[name]}" for name in reversed(found) if getattr(self, name) > 1
        )

    def __str__(self) -> str:
        named = ("dp_replicate", "dp_shard", "ulysses", "ring")
        return " x ".join(f"parallel.{name} {getattr(self, name)}" for name in named)


def resolve_degrees(cfg: ParallelConfig, world_size: int) -> Degrees:
    """The degrees with -1 filled in.

    Raises:
        ConfigError: their product is not the number of ranks, or two of them are to be what is left.
    """
    asked = {
        "dp_replicate": cfg.dp_replicate,
        "dp_shard": cfg.dp_shard,
        "ulysses": cfg.ulysses,
        "ring": cfg.ring,
    }
    left = [name for name, degree in asked.items() if degree == -1]
    if len(left) > 1:
        raise ConfigError(
            "parallel.dp_replicate=-1 and parallel.dp_shard=-1 leave both to be what the other leaves; set one of them"
        )
    fixed = math.prod(degree for degree in asked.values() if degree != -1)
    if left:
        asked[left[0]] = max(1, world_size // fixed) if fixed else 1
    found = Degrees(**asked)
    product = math.prod(asked.values())
    if product != world_size:
        raise ConfigError(
            f"parallel degrees do not fill the job: {found} = {product}, but {world_size} rank(s) are running; "
            f"{_remedy(asked, world_size)}"
        )
    return found


def _remedy(asked: dict[str, int], world_size: int) -> str:
    product = math.prod(asked.values())
    start = f"start {product} ranks" if product else "leave no degree at 0"
    others = product // asked["dp_shard"] if asked["dp_shard"] else 0
    if others and world_size % others == 0:
        return f"set parallel.dp_shard=-1 or {start}"
    return f"choose degrees whose product is {world_size} or {start}"


def check_degrees(cfg: Config, degrees: Degrees) -> None:
    """Raises ConfigError if what is trained cannot be divided so."""
    if degrees.cp > 1 and cfg.task != "text_to_video":
        raise ConfigError(
            f"parallel.ulysses={degrees.ulysses} and parallel.ring={degrees.ring} divide the tokens of a transformer, "
            f"and task={cfg.task} trains none; set both to 1"
        )
    if cfg.model.num_heads % degrees.ulysses:
        fitting = [n for n in range(1, cfg.model.num_heads + 1) if cfg.model.num_heads % n == 0]
        raise ConfigError(
            f"parallel.ulysses={degrees.ulysses} does not divide model.num_heads={cfg.model.num_heads}; degrees that "
            f"do: {', '.join(map(str, fitting))}, and parallel.ring takes any"
        )
    check_ring(cfg, degrees)


def check_ring(cfg: Config, degrees: Degrees) -> None:
    """Raises ConfigError if the attention kernel cannot work on a part of the keys."""
    if degrees.ring > 1 and cfg.model.attention in GIVE_NO_LSE:
        fitting = [name for name in get_args(Attention) if name not in GIVE_NO_LSE]
        raise ConfigError(
            f"parallel.ring={degrees.ring} merges parts of attention by their log-sum-exp, and "
            f"model.attention={cfg.model.attention} gives none; choose one of {', '.join(fitting)}, or use "
            "parallel.ulysses, which takes any"
        )


def describe_layout(engine: str, degrees: Degrees) -> str:
    """`fsdp x2`, `hsdp 2x2 x ulysses 2`, `zero2 x4`."""
    shards, replicas = degrees.dp_shard, degrees.dp_replicate
    cut = [
        f"{name} {count}"
        for name, count in (("ulysses", degrees.ulysses), ("ring", degrees.ring))
        if count > 1
    ]
    if engine != "fsdp":
        return " x ".join([f"{engine} x{shards}", *cut])
    if replicas > 1:
        return " x ".join([f"hsdp {replicas}x{shards}" if shards > 1 else f"ddp x{replicas}", *cut])
    return " x ".join([f"fsdp x{shards}", *cut] if shards > 1 else cut or ["single"])
