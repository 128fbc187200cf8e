"""Assembles the data of a run: sources, buckets, the tape, stored latents and held-out clips."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import nn

from sora_train.checkpoint.meta import CheckpointMeta
from sora_train.config import Config
from sora_train.data.captions.choice import captions_by_name, require_trigger
from sora_train.data.captions.texts import MAIN
from sora_train.data.index.sources import Sources, SourceSnapshot, open_sources
from sora_train.data.loader import Loader
from sora_train.data.manifest import Manifest
from sora_train.data.sample import Bucket, Clip, ClipBatch, MicroBatch
from sora_train.data.tape.buckets import Assignment, BucketSpec
from sora_train.data.tape.mixture import TapeSequence
from sora_train.data.tape.tape import Tape, require_efficiency
from sora_train.errors import Preempted
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.runtime import preemption
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World
from sora_train.training.pipeline.encoding import (
    CacheFiller,
    Caches,
    distinct,
    embed_captions,
    fill_cache,
    open_caches,
    open_filler,
)
from sora_train.training.pipeline.plan import (
    bucket_table,
    cost_model,
    data_as_read,
    flops_counter,
    memory_cap,
    plan,
    require_cacheable,
    require_stored,
    token_counter,
)
from sora_train.training.pipeline.shared_batches import read_together
from sora_train.training.pipeline.validation_clips import read_validation
from sora_train.training.run import RunContext


@dataclass
class TrainingData:
    """The data of a run. `step()` is the only call on the hot path of the loop."""

    manifest: Manifest
    table: list[BucketSpec]
    assignment: Assignment
    sources: Sources
    tape: TapeSequence
    loader: Loader
    tokens_of: Callable[[Bucket], int]
    flops_of: Callable[[Bucket], int]
    """Operations of training on one clip of a bucket."""
    val_clips: list[Clip]
    micro_batches: int
    filler: CacheFiller | None = None
    """Encodes clips that are not in the cache; None without a cache."""
    control: ControlPlane | None = None
    """For the agreement of ranks that read the same micro-batches; None where there are none."""
    _waited: float = field(default=0.0, repr=False)

    @classmethod
    def build(
        cls,
        run: RunContext,
        vae: VideoVAE,
        model: nn.Module | None,
        resumed: CheckpointMeta | None = None,
    ) -> "TrainingData":
        """Open the sources, plan the tape, fill the cache.

        `resumed` belongs to the checkpoint of a resumed run: rows keep their numbers, rows that the sources have
        gained since then join at the end of the epoch, and rows excluded since then are not trained again. Without a
        model the data can be inspected, not trained on.

        Raises:
            UserError: a source or its captions are missing, no clip fits a bucket, too many are dropped,
                or the world size leaves too many ranks idle.
        """
        cfg, world, control = run.cfg, run.world, run.control
        require_efficiency(cfg.train.micro_batches, world.dp_size, cfg.elastic.min_efficiency)
        snapshots = SourceSnapshot.listed(resumed.snapshots) if resumed else []
        sources = open_together(cfg, control, run.folder.path, snapshots)
        require_trigger(sources.train, cfg.adapter.trigger)
        reads_vae_latents = cfg.task == "text_to_video"
        patch = cfg.model.patch_size if reads_vae_latents else (1, 1, 1)
        table = bucket_table(cfg, vae, patch)
        tokens_of = token_counter(vae, patch)
        memory, cost = memory_cap(cfg, vae, tokens_of), cost_model(cfg, model)
        now = next_micro_batch(resumed) if resumed else 0
        sources, tape, assignment = plan(
            cfg, sources, table, tokens_of, cost, memory=memory, now=now
        )
        vae_digest = vae.digest()
        for manifest in (sources.train, sources.val):
            require_stored(cfg, manifest, table, vae, vae_digest, model)
        require_cacheable(cfg, vae)
        caches = open_caches(cfg, vae_digest, model, run.folder.path / "cache", world)
        loader = open_loader(run, sources.train, tape, assignment, vae_digest, caches)
        filler = open_filler(cfg, loader, vae, world.device, caches)
        if filler is not None and cfg.data.cache == "latents":
            encode_all(filler, world, control)
        val_clips = read_validation(cfg, sources.val, table, vae, reads_vae_latents, control)
        if filler is not None and cfg.memory.encode_first:
            embed_all(cfg, filler, sources.train, assignment, control)
        if filler is not None:
            val_clips = [filler.with_text(clip) for clip in val_clips]
        return cls(
            manifest=sources.train,
            table=table,
            assignment=assignment,
            sources=sources,
            tape=tape,
            loader=loader,
            tokens_of=tokens_of,
            flops_of=flops_counter(cfg, vae, tokens_of, model),
            val_clips=val_clips,
            micro_batches=cfg.train.micro_batches,
            filler=filler,
            control=control if world.cp > 1 else None,
        )

    def step(self, step: int) -> list[ClipBatch]:
        """This rank's micro-batches of optimizer step `step` (0-based)."""
        loader, filler = self.loader, self.filler
        before = loader.wait_seconds
        if self.control is not None:
            batches = read_together(
                lambda: loader.step(step),
                lambda failure: loader.record(step, failure, on_disk=loader.is_cp_leader),
                filler,
                self.control,
            )
        else:
            batches = loader.step(step)
            if filler is not None:
                batches = [filler.filled(batch) for batch in batches]
        self._waited += loader.wait_seconds - before
        return batches

    def rows_at(self, step: int) -> list[int]:
        """The rows that this rank reads in a step."""
        return self.loader.rows_at(step)

    def micro_batches_at(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step, as the tape has them."""
        return self.loader.micro_batches_at(step)

    def idle(self, step: int) -> ClipBatch:
        """The micro-batch without clips of a rank that has no work in a step."""
        return self.loader.idle(step)

    def take_wait_seconds(self) -> float:
        """Seconds waited for data since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def take_encode_seconds(self) -> float:
        """Seconds spent on clips that the cache lacked, since the last call."""
        return self.filler.take_seconds() if self.filler else 0.0

    def part(self, step: int) -> Tape:
        """The tape that a step is drawn from, as long as neither the mix nor the sources change."""
        return self.tape.at(step * self.micro_batches)

    def epoch_at(self, step: int) -> float:
        """Epochs trained before a step."""
        return self.tape.epochs_before(step * self.micro_batches)

    def plan_digest(self, index: int) -> str:
        """The digest of the rows and micro-batches of the epoch that micro-batch `index` belongs to."""
        part = self.tape.at(index)
        epoch = part.epoch((index - part.first) // part.per_epoch)
        digest = hashlib.blake2b(digest_size=16)
        for array in (epoch.rows, epoch.starts, epoch.bucket):
            digest.update(np.ascontiguousarray(array, np.int64).tobytes())
        return digest.hexdigest()

    def with_steps(self, cfg: Config) -> Config:
        """The config with `train.epochs` converted to `train.steps`, which schedules and the end of the run use."""
        if not cfg.train.epochs:
            return cfg
        steps = math.ceil(self.tape.index_after(cfg.train.epochs) / self.micro_batches)
        train = cfg.train.model_copy(update={"steps": steps, "epochs": 0.0})
        return cfg.model_copy(update={"train": train})

    def account(self) -> dict[str, int]:
        """Clips of all sources, held-out ones left out: `used + dropped + failed = total`.

        `dropped` fit no bucket or were known to be unusable, `failed` did not decode in this run.
        """
        parts = self.account_by_source().values()
        return {name: sum(part[name] for part in parts) for name in next(iter(parts))}

    def account_by_source(self) -> dict[str, dict[str, int]]:
        """`account` of each source."""
        self.loader.quarantine.refresh()
        accounts = {}
        failed_rows = np.array(self.loader.quarantine.rows(), int)
        for number, name in enumerate(self.sources.names):
            own = self.sources.source_of_row == number
            total, failed = int(own.sum()), int(own[failed_rows].sum())
            dropped = int((self.assignment.reasons[own] != "").sum())
            accounts[name] = {
                "used": total - dropped - failed,
                "dropped": dropped,
                "failed": failed,
                "total": total,
            }
        return accounts

    def close(self) -> None:
        self.loader.close()


def next_micro_batch(meta: CheckpointMeta) -> int:
    """The first micro-batch of the tape that a checkpoint has not trained."""
    return meta.train.data_step * int(meta.config["train"]["micro_batches"])


def mean_step(data: TrainingData, data_step: int) -> tuple[float, float, float]:
    """Clips, tokens and operations (forward and backward) of an average step."""
    part = data.part(data_step)
    epoch = part.epoch(0)
    sizes = np.diff(epoch.starts).tolist()
    buckets = [part.buckets[bucket] for bucket in epoch.bucket]
    tokens = sum(data.tokens_of(each) * size for each, size in zip(buckets, sizes, strict=True))
    flops = sum(data.flops_of(each) * size for each, size in zip(buckets, sizes, strict=True))
    steps = part.per_epoch / data.micro_batches
    return part.clips_per_epoch / steps, tokens / steps, flops / steps


def open_together(
    cfg: Config, control: ControlPlane, run_dir: Path, snapshots: Sequence[SourceSnapshot] = ()
) -> Sources:
    """`open_sources` on every rank: rank 0 probes or renders, the others read the manifests it has written."""
    opened: Sources | None = None
    error: Exception | None = None
    if control.world.is_main:
        try:
            opened = open_sources(cfg, run_dir, snapshots)
        except Exception as failure:
            error = failure
    control.raise_together(error)
    return opened or open_sources(cfg, run_dir, snapshots)


def open_loader(
    run: RunContext,
    manifest: Manifest,
    tape: TapeSequence,
    assignment: Assignment,
    vae_digest: str,
    caches: Caches,
) -> Loader:
    """The loader of this rank's micro-batches."""
    cfg, world = run.cfg, run.world
    return Loader(
        manifest,
        tape,
        cfg.buckets,
        data_as_read(cfg),
        seed=cfg.seed,
        micro_batches=cfg.train.micro_batches,
        rank=world.dp_rank,
        world_size=world.dp_size,
        vae_digest=vae_digest,
        vae_dtype=cfg.vae.dtype,
        cache=caches.latents,
        texts=caches.texts,
        run_dir=run.folder.path,
        reasons=assignment.reasons,
        is_cp_leader=world.cp_rank == 0,
    )


def embed_all(
    cfg: Config,
    filler: CacheFiller,
    manifest: Manifest,
    assignment: Assignment,
    control: ControlPlane,
) -> None:
    """Store the embeddings of all captions that a clip may be trained on. Raises as `encode_all` does, and UserError on
    all ranks where the cache has no room."""
    # Not both networks on the device at a time.
    filler.vae.to("cpu")
    named = captions_by_name(manifest) if filler.texts is not None else {}
    wanted = {MAIN, *(name for name, weight in cfg.data.caption_weights.items() if weight > 0)}
    texts = (
        text
        for name in wanted & named.keys()
        for row, text in named[name].items()
        if assignment.bucket_of_row[row] >= 0
    )
    captions = distinct(list(texts))
    control.together(lambda: embed_captions(filler, captions, control.world, preemption.pending))
    leave_if_preempted(control, "captions were being embedded")


def encode_all(filler: CacheFiller, world: World, control: ControlPlane) -> None:
    """Store the latents of every clip before step 1. Raises Preempted on all ranks where one has to leave."""
    fill_cache(filler, world, "encoding clips", preemption.pending)
    leave_if_preempted(control, "clips were being encoded")


def leave_if_preempted(control: ControlPlane, what: str) -> None:
    if control.sum([float(preemption.pending())])[0]:
        raise Preempted(
            f"preempted while {what}; those done are stored, and the same command continues"
        )
