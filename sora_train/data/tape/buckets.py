"""Buckets: the few shapes clips are brought to, and which clip goes into which. Pure functions.

A bucket is (frames, height, width). The table is the product of resolution classes, durations and
aspect ratios. Every sample gets exactly one bucket or one reason, by (seed, sample) alone, so that
an epoch has the same counts as every other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sora_train.base.seeding import key_seed
from sora_train.config import BucketClass, BucketsConfig
from sora_train.data.manifest import Manifest
from sora_train.data.sample import Bucket
from sora_train.data.tape import keyed
from sora_train.data.transforms import sampled_frames
from sora_train.errors import ConfigError

NO_BUCKET = -1
# A bucket whose area is this many times its class's is not what was asked for.
MAX_AREA_RATIO = 2.0


@dataclass(frozen=True)
class BucketSpec:
    """A bucket and the line of the table it comes from."""

    bucket: Bucket
    class_name: str
    aspect_ratio: str
    probability: float


@dataclass(frozen=True)
class Assignment:
    """`bucket_of_row` indexes the table (-1: none); `reasons` says why not ('' where a bucket is)."""

    bucket_of_row: np.ndarray
    reasons: np.ndarray

    def clips_per_bucket(self, table: Sequence[BucketSpec]) -> dict[str, int]:
        """Clips by bucket name, empty buckets included."""
        counts = np.bincount(self.bucket_of_row[self.bucket_of_row >= 0], minlength=len(table))
        return {spec.bucket.name: int(count) for spec, count in zip(table, counts, strict=True)}

    def dropped(self) -> dict[str, int]:
        """Clips without a bucket, by reason."""
        return dict(Counter(reason for reason in self.reasons.tolist() if reason))


def build_buckets(
    cfg: BucketsConfig, *, temporal_factor: int, spatial_multiple: int
) -> list[BucketSpec]:
    """The table: classes x durations x aspect ratios.

    Heights and widths are multiples of `spatial_multiple` (the VAE's factor times the patch),
    durations 1 + k * `temporal_factor`. Raises ConfigError naming the key that cannot be met.
    """
    table: list[BucketSpec] = []
    owner: dict[Bucket, str] = {}
    for number, cls in enumerate(cfg.classes):
        key = f"buckets.classes[{number}]"
        _check_frames(cls, key, temporal_factor)
        for ratio in cls.aspect_ratios:
            height, width = _frame_size(cls, key, ratio, spatial_multiple)
            for frames in cls.frames:
                bucket = Bucket(frames, height, width)
                if bucket in owner:
                    raise ConfigError(
                        f"{key}: aspect ratio {ratio!r} of class {cls.name!r} gives the bucket {bucket.name}, "
                        f"which {owner[bucket]} gives too; sizes are multiples of {spatial_multiple} pixels, "
                        "so leave one of them out or raise `pixels`"
                    )
                owner[bucket] = f"{ratio!r} of class {cls.name!r}"
                table.append(BucketSpec(bucket, cls.name, ratio, cls.probability))
    return table


def _check_frames(cls: BucketClass, key: str, temporal_factor: int) -> None:
    if not cls.frames:
        raise ConfigError(
            f"{key}.frames is empty; give at least one clip length, such as {1 + temporal_factor}"
        )
    for frames in cls.frames:
        if frames < 1 or (frames - 1) % temporal_factor:
            low = 1 + max(0, frames - 1) // temporal_factor * temporal_factor
            raise ConfigError(
                f"{key}.frames={frames} is not 1 + k * {temporal_factor}, which the VAE's temporal factor "
                f"asks for; use {low} or {low + temporal_factor}"
            )
    if len(set(cls.frames)) != len(cls.frames):
        raise ConfigError(
            f"{key}.frames={list(cls.frames)} names a clip length twice; keep it once"
        )


def parse_ratio(text: str, key: str) -> float:
    """Width over height of `W:H`; ConfigError naming `key` where it is none."""
    try:
        width, height = (float(part) for part in text.split(":"))
    except ValueError:
        width = height = 0.0
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise ConfigError(f"{key}.aspect_ratios={text!r} is not width:height, such as 16:9")
    return width / height


def _frame_size(cls: BucketClass, key: str, ratio: str, multiple: int) -> tuple[int, int]:
    """The size nearest to the class's area and the ratio, both sides multiples of `multiple`."""
    aspect = parse_ratio(ratio, key)
    ideal_height, ideal_width = math.sqrt(cls.pixels / aspect), math.sqrt(cls.pixels * aspect)

    def around(length: float) -> set[int]:
        low = int(length // multiple) * multiple
        return {max(low, multiple), low + multiple}

    def error(size: tuple[int, int]) -> float:
        height, width = size
        return abs(math.log(width / height / aspect)) + 0.5 * abs(
            math.log(height * width / cls.pixels)
        )

    sizes = sorted((h, w) for h in around(ideal_height) for w in around(ideal_width))
    height, width = min(sizes, key=error)
    if not 1 / MAX_AREA_RATIO <= height * width / cls.pixels <= MAX_AREA_RATIO:
        raise ConfigError(
            f"{key}.pixels={cls.pixels} at {ratio!r} comes to {height}x{width}, since both sides are multiples "
            f"of {multiple} (VAE factor times patch); use about {height * width} pixels"
        )
    return height, width


def assign(
    manifest: Manifest,
    table: Sequence[BucketSpec],
    cfg: BucketsConfig,
    seed: int,
    *,
    latents: bool = True,
) -> Assignment:
    """The bucket of every row, or the reason it has none (the manifest's, or `too_short`,
    `too_small`, `aspect_ratio`, `latents_shape`, `latents_only`).

    Within a class a clip takes the nearest aspect ratio and the longest duration it fills; among
    the classes it fits, one is drawn by the classes' probabilities with a key of (seed, row). A
    sample that is stored as latents alone fits the bucket of exactly its shape, or none without
    `latents`.
    """
    usable = manifest.drop_reason == ""
    reasons = manifest.drop_reason.copy()
    fixed = usable & (manifest.kind == "latents")
    usable &= ~fixed
    long_enough = np.zeros(len(manifest), bool)
    large_enough = np.zeros(len(manifest), bool)
    chosen = np.full(len(manifest), NO_BUCKET, np.int64)
    best = np.full(len(manifest), np.inf)
    draws = keyed.words(key_seed(seed, "bucket"), np.arange(len(manifest)))
    for number, name in enumerate(dict.fromkeys(spec.class_name for spec in table)):
        members = [index for index, spec in enumerate(table) if spec.class_name == name]
        index, fits_time, fits_size, fits_crop = _fit_class(manifest, table, members, cfg)
        long_enough |= fits_time
        large_enough |= fits_time & fits_size
        feasible = usable & fits_time & fits_size & fits_crop
        # The smallest of exponential draws with rates p_i is number i with probability p_i / sum.
        draw = -np.log1p(-keyed.uniforms(draws, number)) / table[members[0]].probability
        better = feasible & (draw < best)
        chosen[better], best[better] = index[better], draw[better]
    left = usable & (chosen == NO_BUCKET)
    reasons[left & large_enough] = "aspect_ratio"
    reasons[left & ~large_enough] = "too_small"
    reasons[left & ~long_enough] = "too_short"
    if fixed.any():
        if latents:
            chosen[fixed] = _exactly(manifest, table)[fixed]
        reasons[fixed & (chosen == NO_BUCKET)] = "latents_shape" if latents else "latents_only"
    return Assignment(chosen, reasons)


def _exactly(manifest: Manifest, table: Sequence[BucketSpec]) -> np.ndarray:
    """Index of the bucket with exactly the frames, height and width of each row, else NO_BUCKET."""
    bucket_of_row = np.full(len(manifest), NO_BUCKET, np.int64)
    sizes = np.stack([manifest.frames, manifest.height, manifest.width], axis=1)
    for index, spec in enumerate(table):
        bucket = spec.bucket
        equal = sizes == (bucket.frames, bucket.height, bucket.width)
        bucket_of_row[equal.all(axis=1)] = index
    return bucket_of_row


def _fit_class(
    manifest: Manifest, table: Sequence[BucketSpec], members: list[int], cfg: BucketsConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Index of the bucket each row would take in a class, and whether time, size and crop allow it."""
    height = np.maximum(manifest.height, 1).astype(np.float64)
    width = np.maximum(manifest.width, 1).astype(np.float64)
    ratios = list(dict.fromkeys(table[m].aspect_ratio for m in members))
    by_ratio = {r: [m for m in members if table[m].aspect_ratio == r] for r in ratios}
    sizes = np.array(
        [(table[b[0]].bucket.height, table[b[0]].bucket.width) for b in by_ratio.values()]
    )
    off = np.abs(np.log(width / height)[:, None] - np.log(sizes[:, 1] / sizes[:, 0]))
    nearest = off.argmin(axis=1)
    scale = np.minimum(height / sizes[nearest, 0], width / sizes[nearest, 1])
    fits_size = scale * cfg.max_upscale >= 1 - 1e-9
    kept = scale**2 * sizes[nearest].prod(axis=1) / (height * width)
    fits_crop = 1 - kept <= cfg.max_crop + 1e-9

    durations = sorted({table[m].bucket.frames for m in members})
    has = np.where(
        manifest.kind == "image", 1, sampled_frames(manifest.frames, manifest.fps, cfg.fps)
    )
    rank = np.searchsorted(durations, has, side="right") - 1
    lookup = np.array(
        [
            [
                next(m for m in by_ratio[r] if table[m].bucket.frames == frames)
                for frames in durations
            ]
            for r in ratios
        ]
    )
    return lookup[nearest, np.maximum(rank, 0)], rank >= 0, fits_size, fits_crop
