"""How many clips of each bucket make a micro-batch: chosen by hand, by a table, or by predicted cost,
and never more than a rank's memory holds. Pure functions of numbers.

Sizes depend on the config and the clips alone, never on the number of ranks: another world size
trains the same micro-batches.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sora_train.data.sample import Bucket
from sora_train.errors import ConfigError, UserError

GB = 1e9


@dataclass(frozen=True)
class MemoryCap:
    """Bytes of one rank: how many it may take, what it takes before any clip, and a clip of a bucket."""

    cap: float
    fixed: float
    of_clip: Callable[[Bucket], float]

    def needs(self, bucket: Bucket, clips: int) -> float:
        return self.fixed + clips * self.of_clip(bucket)

    def most(self, bucket: Bucket) -> int:
        """Clips that fit; below 1 where not even one does."""
        # 1e-9: a cap set to exactly what is needed must not lose a clip to rounding.
        return math.floor((self.cap - self.fixed) / self.of_clip(bucket) + 1e-9)


def micro_batch_sizes(
    buckets: Sequence[Bucket],
    counts: Sequence[int],
    tokens_of: Callable[[Bucket], int],
    cost: Callable[[int], float],
    micro_batch: int | Literal["auto", "table"],
    micro_batch_tokens: int,
    *,
    table: Mapping[str, int] | None = None,
    memory: MemoryCap | None = None,
) -> dict[Bucket, int]:
    """Clips in one micro-batch of each bucket that has any (`counts`: clips of each bucket).

    With `auto` the cap is the cost of as many clips of the largest bucket as `micro_batch_tokens`
    and `memory` hold, at least one; other buckets take as many clips as cost no more and fit the
    memory. `table` gives clips by the name of the bucket. A bucket with fewer clips than that takes
    all it has.

    Raises:
        UserError: `table` names a bucket that there is not or lacks one that has clips, or a
            micro-batch, or a single clip, does not fit `memory`.
        ConfigError: a number below 1.
    """
    used = {bucket: count for bucket, count in zip(buckets, counts, strict=True) if count > 0}
    if not used:
        return {}
    if memory is not None:
        _require_one_clip(memory, list(used))
    if micro_batch == "auto":
        clips = _equal_cost(list(used), tokens_of, cost, micro_batch_tokens, memory)
    elif micro_batch == "table":
        clips = _from_table(buckets, list(used), table or {})
    else:
        if micro_batch < 1:
            raise ConfigError(f"data.micro_batch={micro_batch} must be 1 or more, auto or table")
        clips = dict.fromkeys(used, micro_batch)
    sizes = {bucket: min(clips[bucket], int(count)) for bucket, count in used.items()}
    if memory is not None:
        _require_fit(memory, sizes, f"data.micro_batch={micro_batch}")
    return sizes


def _equal_cost(
    used: list[Bucket],
    tokens_of: Callable[[Bucket], int],
    cost: Callable[[int], float],
    micro_batch_tokens: int,
    memory: MemoryCap | None,
) -> dict[Bucket, int]:
    largest = max(used, key=tokens_of)
    clips = max(1, micro_batch_tokens // tokens_of(largest))
    if memory is not None:
        # The cost of what really fits, or smaller buckets would cost more than the largest.
        clips = min(clips, memory.most(largest))
    cap = clips * cost(tokens_of(largest))
    # 1e-9: the largest bucket itself must not lose a clip to rounding.
    sizes = {bucket: max(1, int(cap / cost(tokens_of(bucket)) + 1e-9)) for bucket in used}
    if memory is None:
        return sizes
    return {bucket: min(size, memory.most(bucket)) for bucket, size in sizes.items()}


def _from_table(
    buckets: Sequence[Bucket], used: list[Bucket], table: Mapping[str, int]
) -> dict[Bucket, int]:
    known = {bucket.name for bucket in buckets}
    strange = sorted(set(table) - known)
    if strange:
        raise UserError(
            f"data.micro_batch_table names {', '.join(strange)}, which the bucket table lacks; its buckets "
            f"(frames x height x width) are {', '.join(sorted(known))}"
        )
    missing = sorted(bucket.name for bucket in used if bucket.name not in table)
    if missing:
        raise UserError(
            f"data.micro_batch_table says nothing of {', '.join(missing)}, which clips fall into; add how many "
            "of them make a micro-batch"
        )
    return {bucket: table[bucket.name] for bucket in used}


def _require_one_clip(memory: MemoryCap, used: list[Bucket]) -> None:
    """Raises UserError with the bucket that needs most, so that raising the cap once is enough."""
    worst = max(used, key=memory.of_clip)
    if memory.most(worst) < 1:
        raise UserError(
            f"memory cap below one sample of bucket {worst.name}: it needs {gigabytes(memory.needs(worst, 1))} GB "
            f"({gigabytes(memory.fixed)} GB before any clip), data.memory_gb={memory.cap / GB:g}; raise it, leave "
            "the bucket out, or split the weights with parallel.dp_shard"
        )


def _require_fit(memory: MemoryCap, sizes: Mapping[Bucket, int], chosen: str) -> None:
    worst = max(sizes, key=lambda bucket: memory.needs(bucket, sizes[bucket]))
    if sizes[worst] > memory.most(worst):
        raise UserError(
            f"{chosen}: {sizes[worst]} clips of bucket {worst.name} need "
            f"{gigabytes(memory.needs(worst, sizes[worst]))} GB, data.memory_gb={memory.cap / GB:g}; take at most "
            f"{memory.most(worst)} of them, raise data.memory_gb, or set data.micro_batch=auto"
        )


def gigabytes(number: float) -> str:
    """GB with three digits, rounded up: a cap set to what is printed is enough."""
    value = number / GB
    if value <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.ceil(value / unit - 1e-6) * unit:.4g}"
