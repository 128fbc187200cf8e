"""What training would get of the kept clips: hours and tokens of each of its buckets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.manifest import FILE_NAME, Manifest
from sora_train.errors import UserError


@dataclass(frozen=True)
class BucketShare:
    """`name` is frames x height x width."""

    name: str
    class_name: str
    clips: int
    hours: float
    tokens: int
    """Of one clip."""


@dataclass(frozen=True)
class Training:
    """What an experiment makes of the shards: its buckets that have clips, and why others have none."""

    buckets: list[BucketShare]
    left_out: dict[str, int]
    problem: str = ""
    """Why it could not be told, in a sentence."""


def training(out: Path, experiment: str) -> Training:
    """Buckets, hours and tokens by the settings of an experiment, as `sora data report` would have them."""
    if not (out / FILE_NAME).exists():
        return Training([], {}, "no shards were written")
    try:
        return _assigned(Manifest.load(out / FILE_NAME), out, experiment)
    except UserError as error:
        return Training([], {}, str(error))


def _assigned(manifest: Manifest, out: Path, experiment: str) -> Training:
    # What imports torch, which no other part of a preparation needs.
    from sora_train.data.tape.buckets import assign, build_buckets
    from sora_train.models.vae.autoencoder import read_geometry

    cfg: Config = compose(
        [f"experiment={experiment}"], values={"data": {"source": str(out)}}
    ).config
    vae, patch = read_geometry(cfg.vae), cfg.model.patch_size
    table = build_buckets(
        cfg.buckets,
        temporal_factor=vae.frame_step,
        spatial_multiple=vae.spatial_factor * math.lcm(*patch[1:]),
    )
    assignment = assign(manifest, table, cfg.buckets, cfg.seed)
    found = []
    for number, spec in enumerate(table):
        members = assignment.bucket_of_row == number
        bucket = spec.bucket
        _, *sizes = vae.latent_shape(bucket.frames, bucket.height, bucket.width)
        tokens = math.prod(size // by for size, by in zip(sizes, patch, strict=True))
        if members.any():
            hours = float(np.nan_to_num(manifest.duration[members]).sum()) / 3600
            found.append(
                BucketShare(bucket.name, spec.class_name, int(members.sum()), hours, tokens)
            )
    return Training(found, assignment.dropped())
