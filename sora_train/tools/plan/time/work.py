"""What a stage computes: its buckets, the clips of a micro-batch of each, and their floating-point operations."""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np

from sora_train.config import Config
from sora_train.config.schema import did_you_mean
from sora_train.data.sample import Bucket
from sora_train.data.tape.buckets import BucketSpec
from sora_train.data.tape.micro_batches import micro_batch_sizes
from sora_train.data.tape.tape import Tape, row_costs
from sora_train.errors import ConfigError
from sora_train.models.flops import attention_flops, text_flops
from sora_train.tools.plan.assumptions import Assumptions
from sora_train.tools.plan.memory.encoders import sizes_of_vae
from sora_train.tools.plan.time.encoders import caption_flops, geometry_of, vae_flops
from sora_train.training.pipeline.plan import (
    bucket_table,
    cost_model,
    flops_counter,
    memory_cap,
    token_counter,
)

MANY = 10**9  # clips of a bucket, so that none is short of a micro-batch
STORED_BYTES = 4  # of a value of latents in a cache: float32
TAPE_CLIPS = 400_000  # most clips of the tape from which imbalance is read


@dataclass(frozen=True)
class BucketWork:
    """A bucket: what one of its clips costs forward, in operations, and how many make a micro-batch."""

    bucket: Bucket
    class_name: str
    tokens: int
    frames: int
    """Latent frames."""
    share: float
    """Of all clips."""
    clips: int
    flops: int
    """Of training on one clip: forward and backward, attention counted, recomputation not."""
    attention: int
    """Of one clip forward, in softmax(Q K^T) V of the transformer."""
    cross: int
    """Of it, what attends to captions."""
    text: int
    """Of one clip forward, in a text encoder that is trained."""
    encode: float
    """Of encoding one clip by the frozen VAE."""
    caption: float
    """Of encoding one caption by a frozen text encoder, 0 for one that is trained."""
    stored: int
    """Bytes of one clip's latents in a cache."""
    passes: int = 3
    """Forward passes that `flops` are: backward is two, through a frozen base one."""

    @property
    def products(self) -> int:
        """Of one clip forward, in all other matrix products of the transformer."""
        return self.flops // self.passes - self.attention - self.text


@dataclass(frozen=True)
class StageWork:
    """All buckets of a stage that hold clips, and what was taken for granted."""

    works: tuple[BucketWork, ...]
    notes: tuple[str, ...]
    cfg: Config
    spilled: float = 0.0
    """Share of the captions that a cache has no room for."""

    @property
    def cached(self) -> bool:
        """Whether latents and captions come from a cache."""
        return self.cfg.data.cache != "none"

    @property
    def micro_share(self) -> list[float]:
        """Share of the micro-batches that are of each bucket."""
        counts = np.array([work.share / work.clips for work in self.works])
        return (counts / counts.sum()).tolist()

    def mean(self, values: list[float]) -> float:
        """Over micro-batches, of a number of each bucket's."""
        return float(np.dot(self.micro_share, values))


def stage_work(cfg: Config, assume: Assumptions) -> StageWork:
    """Raises ConfigError for a task or a length that cannot be planned, or a mix that names no bucket."""
    if cfg.task != "text_to_video":
        raise ConfigError(
            f"task={cfg.task} is not planned; `sora plan` knows the text-to-video transformer, so name an experiment "
            "of task=text_to_video"
        )
    if not cfg.train.steps:
        raise ConfigError(
            f"train.epochs={cfg.train.epochs:g} needs the clips to be counted; for a plan set "
            "train.steps=N train.epochs=0"
        )
    geometry, vae_note = geometry_of(cfg)
    arch = sizes_of_vae(cfg)
    patch = cfg.model.patch_size
    table = bucket_table(cfg, geometry, patch)
    tokens_of, shares = token_counter(geometry, patch), shares_of(table, assume.mix)
    flops_of = flops_counter(cfg, geometry, tokens_of)
    buckets = [spec.bucket for spec in table]
    counts = [MANY if share > 0 else 0 for share in shares]
    sizes = micro_batch_sizes(
        buckets, counts, tokens_of, cost_model(cfg), cfg.data.micro_batch,
        cfg.data.micro_batch_tokens, table=cfg.data.micro_batch_table,
        memory=memory_cap(cfg, geometry, tokens_of),
    )  # fmt: skip
    works = []
    for spec, share in zip(table, shares, strict=True):
        if share <= 0:
            continue
        bucket = spec.bucket
        shape = geometry.latent_shape(bucket.frames, bucket.height, bucket.width)
        tokens, text = tokens_of(bucket), cfg.text.max_length
        pixels = bucket.frames * bucket.height * bucket.width
        values = math.prod(shape) * (2 if cfg.data.latents == "sample" else 1)
        works.append(
            BucketWork(
                bucket, spec.class_name, tokens, shape[1], share, sizes[bucket],
                flops_of(bucket), attention_flops(cfg.model, tokens, text),
                attention_flops(cfg.model, tokens, text) - attention_flops(cfg.model, tokens, 0),
                text_flops(cfg.text, text) if cfg.text.trainable else 0,
                vae_flops(arch, pixels),
                0.0 if cfg.text.trainable else caption_flops(cfg.text, 2 * assume.caption_tokens),
                STORED_BYTES * values, 2 if cfg.adapter.on else 3,
            )
        )  # fmt: skip
    return StageWork(tuple(works), (vae_note,) if vae_note else (), cfg)


def shares_of(table: list[BucketSpec], mix: dict[str, float]) -> list[float]:
    """Share of the clips of each bucket; a name of `mix` is a bucket's or a class's.

    Raises:
        ConfigError: `mix` names neither, or leaves nothing.
    """
    sizes = Counter(spec.class_name for spec in table)
    if not mix:
        weights = [spec.probability / sizes[spec.class_name] for spec in table]
    else:
        known = {spec.bucket.name for spec in table} | set(sizes)
        for name, value in mix.items():
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(
                    f"plan.mix names {name!r}; {hint}buckets are {', '.join(sorted(known))}"
                )
            if value < 0:
                raise ConfigError(f"plan.mix.{name}={value:g} is no share; give 0 or more")
        weights = [
            mix.get(spec.bucket.name, mix.get(spec.class_name, 0.0) / sizes[spec.class_name])
            for spec in table
        ]
    if not sum(weights) > 0:
        raise ConfigError("plan.mix leaves no clips; give one bucket a share above 0")
    return [weight / sum(weights) for weight in weights]


class Imbalance:
    """Share of a row that an average rank waits for the slowest one, read from a tape over clips drawn by the mix."""

    def __init__(self, stage: StageWork):
        self.stage = stage
        self._tape = cache(self._make)
        self.of = cache(self._of)

    def _make(self) -> Tape:
        cfg, works = self.stage.cfg, self.stage.works
        clips = 1 / sum(share / work.clips for share, work in zip(self._shares, works, strict=True))
        micro_batches = cfg.train.micro_batches
        rows = min(TAPE_CLIPS, max(20_000, int(40 * clips * micro_batches)))
        draws = np.random.default_rng(cfg.seed).choice(len(works), rows, p=self._shares)
        cost = cost_model(cfg)
        tokens = {work.bucket: work.tokens for work in works}
        return Tape(
            draws, np.arange(rows) // 1000, [work.bucket for work in works],
            {work.bucket: work.clips for work in works},
            seed=cfg.seed, group=cfg.data.group, micro_batches=micro_batches, window_shards=cfg.data.window_shards,
            cost=lambda bucket: cost(tokens[bucket]),
        )  # fmt: skip

    @property
    def fullness(self) -> float:
        """Clips of an average micro-batch, as a share of the most that it could hold."""
        if len(self.stage.works) == 1:
            return 1.0
        tape = self._tape()
        clips = np.bincount(tape.bucket_of_row[tape.rows], minlength=len(tape.buckets))
        full = clips / [work.clips for work in self.stage.works]
        return float(full.sum() / tape.per_epoch)

    @property
    def _shares(self) -> list[float]:
        return [work.share for work in self.stage.works]

    def _of(self, ranks: int) -> float:
        """`ranks` are those that work on different micro-batches."""
        if ranks == 1 or len(self.stage.works) == 1:
            return 0.0
        tape, micro_batches = self._tape(), self.stage.cfg.train.micro_batches
        steps = max(1, min(50, tape.per_epoch // micro_batches))
        costs = row_costs(tape, micro_batches, ranks, steps=steps)
        busy = costs.sum(axis=1) / np.maximum(1, (costs > 0).sum(axis=1))
        most = costs.max(axis=1)
        return float((most - busy).sum() / most.sum())
