"""Assembles what a run trains on: sources, buckets, the tape, stored latents and held-out clips."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sora_train.config import Config, DataConfig
from sora_train.data.buckets import Assignment, BucketSpec, assign, build_buckets
from sora_train.data.cache import LatentCache
from sora_train.data.index import open_source
from sora_train.data.loader import Loader
from sora_train.data.manifest import Manifest
from sora_train.data.plan import Tape, micro_batch_sizes, require_efficiency
from sora_train.data.sample import Bucket, Clip, ClipBatch
from sora_train.data.shapes_source import prepare_shapes
from sora_train.data.stored import require_latents, require_text
from sora_train.distributed import ControlPlane, World
from sora_train.errors import UserError
from sora_train.models.flops import training_flops
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae import VideoVAE
from sora_train.models.vae_geometry import Geometry
from sora_train.objectives import to_pixels
from sora_train.progress import Progress
from sora_train.run_folder import RunFolder

CACHE_CHUNK = 16
SHAPES = "shapes"


@dataclass
class TrainingData:
    """Everything the loop asks about data. `step()` is the only call on its hot path."""

    manifest: Manifest
    table: list[BucketSpec]
    assignment: Assignment
    sizes: dict[Bucket, int]
    tape: Tape
    loader: Loader
    tokens_of: Callable[[Bucket], int]
    val_clips: list[Clip]
    micro_batches: int
    digest: str = ""
    _waited: float = field(default=0.0, repr=False)

    @classmethod
    def build(
        cls,
        cfg: Config,
        vae: VideoVAE,
        model: nn.Module,
        world: World,
        control: ControlPlane,
        folder: RunFolder,
    ) -> "TrainingData":
        """Open the sources, plan the tape, encode what is to be cached.

        Raises:
            UserError: no such source, no caption, no clip that fits a bucket, too many dropped, or
                a world size that would leave too many ranks idle.
        """
        require_efficiency(cfg.train.micro_batches, world.size, cfg.data.min_efficiency)
        train, val = open_together(cfg, world, control, folder.path)
        reads_vae_latents = isinstance(model, TextToVideo)
        patch = cfg.model.patch_size if reads_vae_latents else (1, 1, 1)
        table = bucket_table(cfg, vae, patch)
        tokens_of = token_counter(vae, patch)
        tape, sizes, assignment = plan(cfg, train, table, tokens_of, cost_model(cfg, model))
        vae_digest = vae.digest()
        for manifest in (train, val):
            require_stored(cfg, manifest, table, vae, vae_digest, model)
        cache = None
        if cfg.data.cache == "latents" and reads_vae_latents:
            cache = LatentCache(Path(cfg.data.cache_dir or folder.path / "cache"))
        loader = Loader(
            train,
            tape,
            cfg.buckets,
            data_as_read(cfg),
            seed=cfg.seed,
            micro_batches=cfg.train.micro_batches,
            rank=world.rank,
            world_size=world.size,
            vae_digest=vae_digest,
            cache=cache,
            run_dir=folder.path,
            reasons=assignment.reasons,
        )
        if cache is not None and not cfg.dry_run:
            fill_cache(loader, vae, world, "encoding clips")
            control.barrier()
        val_clips = [] if cfg.dry_run else read_validation(cfg, val, table, vae, reads_vae_latents)
        return cls(
            train,
            table,
            assignment,
            sizes,
            tape,
            loader,
            tokens_of,
            val_clips,
            cfg.train.micro_batches,
            digest=train.digest(),
        )

    def step(self, step: int) -> list[ClipBatch]:
        """This rank's micro-batches of optimizer step `step` (0-based)."""
        before = self.loader.wait_seconds
        batches = self.loader.step(step)
        self._waited += self.loader.wait_seconds - before
        return batches

    def take_wait_seconds(self) -> float:
        """Seconds waited for data since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    @property
    def steps_per_epoch(self) -> float:
        return self.tape.per_epoch / self.micro_batches

    def epoch_at(self, step: int) -> float:
        return step * self.micro_batches / self.tape.per_epoch

    def with_steps(self, cfg: Config) -> Config:
        """The config with `train.epochs` told in steps, which the learning rate and the end go by."""
        if not cfg.train.epochs:
            return cfg
        steps = math.ceil(cfg.train.epochs * self.tape.per_epoch / self.micro_batches)
        train = cfg.train.model_copy(update={"steps": steps, "epochs": 0.0})
        return cfg.model_copy(update={"train": train})

    def account(self) -> dict[str, int]:
        """Clips of the source, held-out ones left out: `used + dropped + failed = total`.

        `dropped` fit no bucket or were known to be unusable, `failed` did not decode in this run.
        """
        self.loader.quarantine.refresh()
        total, failed = len(self.manifest), len(self.loader.quarantine)
        dropped = sum(self.assignment.dropped().values())
        return {
            "used": total - dropped - failed,
            "dropped": dropped,
            "failed": failed,
            "total": total,
        }

    def require_same(self, digest: str) -> None:
        """Raises UserError when the source is not the one the checkpoint was trained on."""
        if digest != self.digest:
            raise UserError(
                "data.source is not what this run was trained on so far (its manifest changed); "
                "restore it, or start anew in another run.dir"
            )

    def close(self) -> None:
        self.loader.close()


def open_together(
    cfg: Config, world: World, control: ControlPlane, run_dir: Path
) -> tuple[Manifest, Manifest]:
    """`open_sources` on every rank: rank 0 probes or renders, the others read the manifests it has written."""
    opened: tuple[Manifest, Manifest] | None = None
    error: Exception | None = None
    if world.is_main:
        try:
            opened = open_sources(cfg, run_dir)
        except Exception as failure:
            error = failure
    control.raise_together(error)
    return opened or open_sources(cfg, run_dir)


def open_sources(cfg: Config, run_dir: Path) -> tuple[Manifest, Manifest]:
    """The manifests of the training clips and of the held-out ones."""
    data, work_dir = cfg.data, run_dir / "data"
    if not data.source:
        raise UserError(
            "data.source is empty; give a folder of clips or shards, a table, or `shapes`"
        )
    train, split = _open(data.source, "train", data.shapes_clips, cfg, work_dir)
    if data.val_source:
        return train, _open(data.val_source, "val", data.shapes_val_clips, cfg, work_dir)[0]
    if split:
        return train, _open(SHAPES, "val", data.shapes_val_clips, cfg, work_dir)[0]
    usable = np.flatnonzero(train.drop_reason == "")
    count = min(data.val_clips, len(usable) // 10)
    held_out = usable[len(usable) - count :]
    kept = np.setdiff1d(np.arange(len(train)), held_out)
    return train.select(kept), train.select(held_out)


def _open(
    source: str, split: str, count: int, cfg: Config, work_dir: Path
) -> tuple[Manifest, bool]:
    """A manifest, and whether the source is the shapes world (which has splits of its own)."""
    data: DataConfig = cfg.data
    if source == SHAPES:
        folder = work_dir / f"shapes-{split}"
        with Progress(count, f"rendering {split} clips") as progress:
            manifest = prepare_shapes(
                folder, split=split, num_clips=count, seed=cfg.seed,
                image_share=data.shapes_image_share, workers=data.num_workers,
                progress=lambda done, total: progress.update(done),
            )  # fmt: skip
        return manifest, True
    with Progress(1, f"indexing {source}") as progress:

        def show(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)

        manifest = open_source(
            source,
            captions=data.captions if split == "train" else "",
            work_dir=work_dir,
            probe=data.probe,
            workers=data.num_workers,
            progress=show,
            allow_empty_captions=data.allow_empty_captions,
            timeout=data.decode_timeout,
        )
    return manifest, False


def data_as_read(cfg: Config) -> DataConfig:
    """The section `data` with what a task that trains on pixels cannot use switched off."""
    if cfg.task == "text_to_video":
        return cfg.data
    return cfg.data.model_copy(update={"stored_latents": "ignore", "stored_text": "ignore"})


def assigned(cfg: Config, manifest: Manifest, table: list[BucketSpec]) -> Assignment:
    """The bucket of every row of a run's manifest."""
    latents = data_as_read(cfg).stored_latents == "use"
    return assign(manifest, table, cfg.buckets, cfg.seed, latents=latents)


def require_stored(
    cfg: Config,
    manifest: Manifest,
    table: list[BucketSpec],
    vae: VideoVAE,
    vae_digest: str,
    model: nn.Module,
) -> None:
    """Raises UserError where latents or embeddings of the shards are not those of this run's networks."""
    data = data_as_read(cfg)
    if not manifest.members.any():
        return
    rows = np.flatnonzero(assigned(cfg, manifest, table).bucket_of_row >= 0).tolist()
    if data.stored_latents == "use":
        require_latents(manifest, rows, vae_digest, vae.latent_shape)
    if data.stored_text == "use" and isinstance(model, TextToVideo):
        require_text(manifest, rows, model.text_digest(), cfg.text.trainable, cfg.text.max_length)


def bucket_table(
    cfg: Config, vae: VideoVAE | Geometry, patch: tuple[int, int, int]
) -> list[BucketSpec]:
    """The buckets whose clips the VAE and the patch embedding take.

    Raises:
        ConfigError: the buckets do not fit the VAE.
    """
    return build_buckets(
        cfg.buckets,
        temporal_factor=vae.frame_step,
        spatial_multiple=vae.spatial_factor * max(patch[1:]),
    )


def token_counter(vae: VideoVAE | Geometry, patch: tuple[int, int, int]) -> Callable[[Bucket], int]:
    """Tokens of one clip of a bucket, after the VAE and the patch embedding."""

    def tokens(bucket: Bucket) -> int:
        _, frames, rows, columns = vae.latent_shape(bucket.frames, bucket.height, bucket.width)
        return (frames // patch[0]) * (rows // patch[1]) * (columns // patch[2])

    return tokens


def plan(
    cfg: Config,
    manifest: Manifest,
    table: list[BucketSpec],
    tokens_of: Callable[[Bucket], int],
    cost: Callable[[int], float],
) -> tuple[Tape, dict[Bucket, int], Assignment]:
    """Buckets of the clips, the most clips of a micro-batch, and the tape over them.

    Raises UserError where no clip fits a bucket.
    """
    data = cfg.data
    assignment = assigned(cfg, manifest, table)
    buckets = [spec.bucket for spec in table]
    counts = np.bincount(
        assignment.bucket_of_row[assignment.bucket_of_row >= 0], minlength=len(buckets)
    )
    sizes = micro_batch_sizes(
        buckets, counts.tolist(), tokens_of, cost, data.micro_batch, data.micro_batch_tokens
    )
    if not sizes:
        raise UserError(no_clip_fits(manifest, assignment, table))
    tape = Tape(
        assignment.bucket_of_row,
        manifest.shard,
        buckets,
        sizes,
        seed=cfg.seed,
        group=data.group,
        window_shards=data.window_shards,
        cost=lambda bucket: cost(tokens_of(bucket)),
    )
    return tape, sizes, assignment


def cost_model(cfg: Config, model: nn.Module | None = None) -> Callable[[int], float]:
    """Cost of a clip of so many tokens; a * S + b * S^2 for a transformer, a * S for the VAE.

    Without a `model` it is that of the model that `cfg` describes.
    """
    text_tokens = cfg.text.max_length // 2
    if isinstance(model, TextToVideo):
        return lambda tokens: float(model.flops(tokens, text_tokens))
    if model is None and cfg.task == "text_to_video":
        return lambda tokens: training_flops(cfg.model, cfg.text, tokens, text_tokens)
    return float


def no_clip_fits(manifest: Manifest, assignment: Assignment, table: list[BucketSpec]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in assignment.dropped().items())
    unusable = np.flatnonzero(manifest.drop_reason != "")
    if len(unusable) == len(manifest) > 0:
        key, detail = manifest.key[unusable[0]], manifest.drop_detail[unusable[0]]
        return (
            f"no clip of data.source={manifest.root} can be used ({reasons}), {key} for one: {detail}; "
            "mend or replace these files"
        )
    names = ", ".join(spec.bucket.name for spec in table)
    return (
        f"no clip fits any bucket ({reasons or 'the source is empty'}); the buckets (frames x height x width) are "
        f"{names}: add shorter or smaller ones under buckets.classes, or raise buckets.max_upscale"
    )


@torch.no_grad()
def fill_cache(
    loader: Loader, vae: VideoVAE, world: World, title: str, size: int = CACHE_CHUNK
) -> None:
    """Encode every clip that is not stored yet, chunk by chunk, the chunks dealt out over the ranks.

    Chunks are cut from the manifest, not from the tape, so stored latents depend on neither the
    world size nor on where a run was cut off.
    """
    chunks = loader.cache_chunks(size, world.rank, world.size)
    total, done = sum(len(rows) for _, rows in chunks), 0
    with Progress(max(total, 1), title, enabled=world.is_main and total > 0) as progress:
        for _, clips, failures in loader.chunks(chunks):
            done += len(clips) + len(failures)
            if clips:
                latents = vae.encode(to_pixels(clips, world.device)).float().cpu().numpy()
                for clip, one in zip(clips, latents, strict=True):
                    loader.store(clip.row, one)
            progress.update(done)


def read_validation(
    cfg: Config, manifest: Manifest, table: list[BucketSpec], vae: VideoVAE, with_latents: bool
) -> list[Clip]:
    """The held-out clips that fit a bucket, decoded once; their latents too where a VAE is frozen.

    Those that fail are named, and bounded by `data.max_drop_fraction` as training clips are.
    """
    assignment = assigned(cfg, manifest, table)
    rows = np.flatnonzero(assignment.bucket_of_row >= 0)[: cfg.validation.max_clips]
    if len(rows) == 0 or cfg.validation.every == 0:
        return []
    kept = np.full(len(manifest), -1)
    kept[rows] = assignment.bucket_of_row[rows]
    buckets = [spec.bucket for spec in table]
    tape = Tape(kept, manifest.shard, buckets, dict.fromkeys(buckets, 1), seed=cfg.seed)
    device = next(vae.parameters()).device
    with Loader(
        manifest, tape, cfg.buckets, data_as_read(cfg).model_copy(update={"max_drop_fraction": 1.0}),
        seed=cfg.seed, micro_batches=1,
    ) as loader:  # fmt: skip
        clips, _ = loader.decode_rows(rows.tolist())
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
