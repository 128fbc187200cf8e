"""What becomes of each clip of a source, found by the same functions that a run uses.

No network is built and no weight is read: sources, buckets, frame times and crops are enough.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from sora_train.base.contact_sheet import MAX_FRAME
from sora_train.base.progress import Progress
from sora_train.config import Config
from sora_train.data.decode.pool import DecodePool, worker_of
from sora_train.data.index.sources import open_sources
from sora_train.data.latents.members import KIND
from sora_train.data.loader import Loader
from sora_train.data.manifest import Manifest
from sora_train.data.sample import Bucket, Failure
from sora_train.data.tape.buckets import Assignment, BucketSpec
from sora_train.data.tape.tape import Tape
from sora_train.data.transforms import crop_size, sampled_frames
from sora_train.models.vae.autoencoder import read_geometry
from sora_train.training.pipeline.plan import assigned, bucket_table, token_counter

CLIPS_A_BUCKET = 3
FRAMES_SHOWN = 5


@dataclass(frozen=True)
class DataPlan:
    """A source, the table of buckets, and which clip goes into which."""

    cfg: Config
    manifest: Manifest
    held_out: int
    table: list[BucketSpec]
    assignment: Assignment
    tokens: list[int]
    """Tokens of a clip of each bucket."""

    @classmethod
    def open(cls, cfg: Config) -> "DataPlan":
        """As a run would: its sources are indexed, or rendered, below `cfg.run.dir`.

        Raises:
            UserError: no such source, no caption, no such VAE.
            ConfigError: the buckets do not fit the VAE.
        """
        geometry = read_geometry(cfg.vae)
        patch = cfg.model.patch_size if cfg.task == "text_to_video" else (1, 1, 1)
        table = bucket_table(cfg, geometry, patch)
        tokens_of = token_counter(geometry, patch)
        sources = open_sources(cfg, Path(cfg.run.dir))
        train, val = sources.train, sources.val
        return cls(
            cfg,
            train,
            len(val),
            table,
            assigned(cfg, train, table),
            [tokens_of(spec.bucket) for spec in table],
        )

    @cached_property
    def used(self) -> np.ndarray:
        """The rows that have a bucket."""
        return np.flatnonzero(self.assignment.bucket_of_row >= 0)

    @cached_property
    def clips_per_bucket(self) -> np.ndarray:
        return np.bincount(self.assignment.bucket_of_row[self.used], minlength=len(self.table))

    @cached_property
    def sampled(self) -> np.ndarray:
        """Frames of each row at the sampling rate."""
        frames = sampled_frames(self.manifest.frames, self.manifest.fps, self.cfg.buckets.fps)
        return np.where(self.manifest.kind == "image", 1, frames)

    def bucket(self, row: int) -> Bucket | None:
        number = int(self.assignment.bucket_of_row[row])
        return self.table[number].bucket if number >= 0 else None

    def fate(self, row: int) -> str:
        """What becomes of a clip: `101 frames at 23.98 -> 67 at 16 fps -> bucket 65x256x448`."""
        manifest, reason = self.manifest, str(self.assignment.reasons[row])
        bucket = self.bucket(row)
        end = f"bucket {bucket.name}" if bucket else f"dropped: {reason.replace('_', ' ')}"
        frames, fps = int(manifest.frames[row]), float(manifest.fps[row])
        if frames == 0:
            return end
        if manifest.kind[row] == KIND:
            return f"latents of {frames} frames at {fps:.4g} fps -> {end}"
        if manifest.kind[row] == "image":
            return f"image -> {end}"
        rate = min(fps, self.cfg.buckets.fps) if fps > 0 else self.cfg.buckets.fps
        varies = " (variable)" if manifest.vfr[row] else ""
        unit = "frame" if frames == 1 else "frames"
        return f"{frames} {unit} at {fps:.4g}{varies} -> {self.sampled[row]} at {rate:.4g} fps -> {end}"

    def framing(self, row: int) -> str:
        """What becomes of its picture: `1280x720 -> 98 % kept -> 448x256`."""
        height, width = int(self.manifest.height[row]), int(self.manifest.width[row])
        bucket = self.bucket(row)
        if not height or not width:
            return ""
        if bucket is None:
            return f"{width}x{height}"
        kept = np.prod(crop_size(height, width, bucket)) / (height * width)
        return f"{width}x{height} -> {100 * kept:.0f} % kept -> {bucket.width}x{bucket.height}"

    def clip_tokens(self, row: int) -> int:
        number = int(self.assignment.bucket_of_row[row])
        return self.tokens[number] if number >= 0 else 0


@dataclass(frozen=True)
class Thumbnail:
    """A few frames of a clip as training would see them, or why there are none."""

    row: int
    frames: np.ndarray | None
    problem: str = ""


def read_thumbnails(plan: DataPlan) -> list[Thumbnail]:
    """Up to CLIPS_A_BUCKET clips of each bucket, spread over the source, in the table's order."""
    if not len(plan.used):
        return []
    rows: list[int] = []
    for number in range(len(plan.table)):
        seen = (plan.assignment.bucket_of_row == number) & (plan.manifest.kind != KIND)
        members = np.flatnonzero(seen)
        picks = np.linspace(0, len(members) - 1, min(CLIPS_A_BUCKET, len(members))).astype(int)
        rows += members[picks].tolist()
    buckets = [spec.bucket for spec in plan.table]
    cfg = plan.cfg.data.model_copy(update={"max_drop_fraction": 1.0})
    tape = Tape(
        plan.assignment.bucket_of_row,
        plan.manifest.shard,
        buckets,
        dict.fromkeys(buckets, 1),
        seed=plan.cfg.seed,
    )
    thumbnails = []
    with (
        Loader(
            plan.manifest, tape, plan.cfg.buckets, cfg, seed=plan.cfg.seed, micro_batches=1
        ) as loader,
        DecodePool(cfg.num_workers, cfg.decode_timeout, module=worker_of(loader.program)) as pool,
        Progress(len(rows), "decoding examples") as progress,
    ):
        futures = []
        for row in rows:
            request = loader.request(row, 0)
            # A minute of 1080p is 6 GB: only what is shown is asked for, at the size it is shown in.
            picks = np.linspace(0, len(request.times) - 1, min(FRAMES_SHOWN, len(request.times)))
            shrink = min(1.0, MAX_FRAME[0] / request.width, MAX_FRAME[1] / request.height)
            futures.append(
                pool.submit(
                    replace(
                        request,
                        times=tuple(request.times[index] for index in picks.round().astype(int)),
                        height=max(1, round(request.height * shrink)),
                        width=max(1, round(request.width * shrink)),
                    )
                )
            )
        for done, (row, future) in enumerate(zip(rows, futures, strict=True), start=1):
            value = future.result()
            failed = isinstance(value, Failure)
            thumbnails.append(
                Thumbnail(row, None if failed else value, str(value.detail) if failed else "")
            )
            progress.update(done)
    return thumbnails
