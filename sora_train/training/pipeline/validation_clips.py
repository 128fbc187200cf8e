"""The held-out clips of a run, decoded once before it begins."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sora_train.config import Config
from sora_train.data.index.sources import open_sources
from sora_train.data.loader import Loader
from sora_train.data.manifest import Manifest
from sora_train.data.sample import Clip, Failure
from sora_train.data.tape.buckets import BucketSpec
from sora_train.data.tape.tape import Tape
from sora_train.errors import Fault
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import to_pixels
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World
from sora_train.training.pipeline.plan import assigned, bucket_table, data_as_read


def _without_failed(
    cfg: Config,
    manifest: Manifest,
    clips: list[Clip],
    failures: list[Failure],
    control: ControlPlane,
) -> list[Clip]:
    """The clips that no rank failed to decode, so that all ranks hold the same; the others are named.

    Raises Fault where they are more than `data.max_drop_fraction`.
    """
    mine = {failure.row: f"{failure.reason}, {failure.detail}" for failure in failures}
    failed: dict[int, str] = {}
    for of_rank in control.gather_objects(mine):
        assert isinstance(of_rank, dict)
        failed |= of_rank
    if not failed:
        return clips
    named = "; ".join(f"{manifest.key[row]}: {why}" for row, why in list(failed.items())[:3])
    share = len(failed) / (len(clips) + len(mine))
    if share > cfg.data.max_drop_fraction:
        raise Fault(
            f"{share:.1%} of the held-out clips do not decode, more than data.max_drop_fraction="
            f"{cfg.data.max_drop_fraction:g} ({named}); mend or remove them"
        )
    if control.world.is_main:
        print(f"held-out clips left out: {len(failed)} ({named})", file=sys.stderr, flush=True)
    return [clip for clip in clips if clip.row not in failed]


def held_out_clips(cfg: Config, vae: VideoVAE, *, with_latents: bool) -> list[Clip]:
    """The held-out clips of a run as pixels, cut as its validation cuts them; for who looks at it from outside.

    Raises UserError where its sources cannot be read.
    """
    # Stored latents are of no use here: what is measured begins with pixels.
    data = cfg.data.model_copy(update={"stored_latents": "ignore", "stored_text": "ignore"})
    validation = cfg.validation.model_copy(update={"every": 1})
    cfg = cfg.model_copy(update={"data": data, "validation": validation, "dry_run": False})
    sources = open_sources(cfg, Path(cfg.run.dir))
    table = bucket_table(cfg, vae, cfg.model.patch_size)
    control = ControlPlane(World(0, 1, 0, 1, torch.device("cpu")))
    return read_validation(cfg, sources.val, table, vae, with_latents, control)


def read_validation(
    cfg: Config,
    manifest: Manifest,
    table: list[BucketSpec],
    vae: VideoVAE,
    with_latents: bool,
    control: ControlPlane,
) -> list[Clip]:
    """The held-out clips that fit a bucket, decoded once, with their main captions; their latents too
    where a VAE is frozen. None for a dry run.

    Those that fail are named, and bounded by `data.max_drop_fraction` as training clips are.
    """
    assignment = assigned(cfg, manifest, table)
    rows = np.flatnonzero(assignment.bucket_of_row >= 0)[: cfg.validation.max_clips]
    if cfg.dry_run or len(rows) == 0 or cfg.validation.every == 0:
        return []
    kept = np.full(len(manifest), -1)
    kept[rows] = assignment.bucket_of_row[rows]
    buckets = [spec.bucket for spec in table]
    tape = Tape(kept, manifest.shard, buckets, dict.fromkeys(buckets, 1), seed=cfg.seed)
    device = next(vae.parameters()).device
    data = data_as_read(cfg).model_copy(update={"max_drop_fraction": 1.0, "caption_weights": {}})
    with Loader(manifest, tape, cfg.buckets, data, seed=cfg.seed, micro_batches=1) as loader:
        clips, failures = loader.decode_rows(rows.tolist())
    clips = _without_failed(cfg, manifest, clips, failures, control)
    if not with_latents:
        return clips
    with torch.no_grad():
        return [
            clip
            if clip.latents is not None
            else replace(
                clip, latents=vae.encode(to_pixels([clip], device))[0].float().cpu().numpy()
            )
            for clip in clips
        ]
