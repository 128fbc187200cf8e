"""The plan of a run, made before any clip is read: buckets, costs, micro-batch sizes and the tape."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from sora_train.config import Config, DataConfig
from sora_train.data.exclusion import EXCLUDED
from sora_train.data.index.sources import Sources, SourceSnapshot
from sora_train.data.latents.check import (
    first_of_each,
    refuse_latents,
    require_latents,
    require_text,
)
from sora_train.data.latents.provenance import Made, decoder_name, latents_made_with, text_made_with
from sora_train.data.loader import backend_of
from sora_train.data.manifest import Manifest
from sora_train.data.sample import Bucket
from sora_train.data.tape.buckets import NO_BUCKET, Assignment, BucketSpec, assign, build_buckets
from sora_train.data.tape.micro_batches import GB, MemoryCap, micro_batch_sizes
from sora_train.data.tape.mixture import Change, Exclusion, TapeSequence, repeats_of
from sora_train.data.tape.shuffle import samples_per_epoch
from sora_train.data.tape.tape import SourceRepeats, Tape
from sora_train.errors import ConfigError, UserError
from sora_train.models import memory as sizes_in_memory
from sora_train.models.flops import trained_forward_flops, training_flops
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.transformer.dit import check_patches
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.vae.geometry import Geometry
from sora_train.objectives.clips import without_pixels


def bucket_table(
    cfg: Config, vae: VideoVAE | Geometry, patch: tuple[int, int, int]
) -> list[BucketSpec]:
    """The buckets whose clips the VAE and the patch embedding take.

    Raises:
        ConfigError: the buckets do not fit the VAE.
        UserError: a bucket reaches past the transformer's rotary positions.
    """
    table = build_buckets(
        cfg.buckets,
        temporal_factor=vae.frame_step,
        spatial_multiple=vae.spatial_factor * math.lcm(*patch[1:]),
    )
    if cfg.task == "text_to_video":
        for spec in table:
            shape = spec.bucket.frames, spec.bucket.height, spec.bucket.width
            check_patches(cfg.model, *vae.latent_shape(*shape)[1:])
    return table


def token_counter(vae: VideoVAE | Geometry, patch: tuple[int, int, int]) -> Callable[[Bucket], int]:
    """Tokens of one clip of a bucket, after the VAE and the patch embedding."""

    def tokens(bucket: Bucket) -> int:
        _, frames, rows, columns = vae.latent_shape(bucket.frames, bucket.height, bucket.width)
        return (frames // patch[0]) * (rows // patch[1]) * (columns // patch[2])

    return tokens


def flops_counter(
    cfg: Config,
    vae: VideoVAE | Geometry,
    tokens_of: Callable[[Bucket], int],
    model: nn.Module | None = None,
) -> Callable[[Bucket], int]:
    """Operations of training on one clip of a bucket; captions count at `text.max_length`. 0 for `task=vae`.

    They are those of the model that `cfg` describes, or of a `model` of another kind that counts its own (`flops`).
    """
    caption = cfg.text.max_length
    own = None if isinstance(model, TextToVideo) else getattr(model, "flops", None)

    def flops(bucket: Bucket) -> int:
        if cfg.task != "text_to_video":
            return 0
        tokens = tokens_of(bucket)
        if own is not None:
            return 3 * int(own(tokens, caption))
        frames = vae.latent_shape(bucket.frames, bucket.height, bucket.width)[1]
        return training_flops(cfg.model, cfg.text, tokens, frames, caption, frozen=cfg.adapter.on)

    return flops


def data_as_read(cfg: Config) -> DataConfig:
    """The section `data` with what a task that trains on pixels cannot use switched off."""
    if cfg.task == "text_to_video":
        return cfg.data
    return cfg.data.model_copy(update={"stored_latents": "ignore", "stored_text": "ignore"})


def assigned(cfg: Config, manifest: Manifest, table: list[BucketSpec]) -> Assignment:
    """The bucket of every row of a run's manifest."""
    latents = data_as_read(cfg).stored_latents == "use"
    return assign(manifest, table, cfg.buckets, cfg.seed, latents=latents)


def needs_pixels(cfg: Config, vae: VideoVAE) -> bool:
    """Whether given frames are encoded from pixels of their own, which stored latents lack."""
    if cfg.task != "text_to_video":
        return False
    given = [kind for kind, share in cfg.objective.mix if kind != "t2v" and share > 0]
    return cfg.objective.needs_pixels or bool(given and not vae.causal)


def require_cacheable(cfg: Config, vae: VideoVAE) -> None:
    """Raises ConfigError for a cache of latents in a run that gives frames encoded from pixels."""
    if cfg.data.cache == "latents" and needs_pixels(cfg, vae):
        raise ConfigError(
            "data.cache=latents keeps no pixels, and objective.conditioning gives frames that are encoded from pixels "
            f"of their own; set data.cache=none, or {without_pixels(vae)}"
        )


def require_stored(
    cfg: Config,
    manifest: Manifest,
    table: list[BucketSpec],
    vae: VideoVAE,
    vae_digest: str,
    model: nn.Module | None,
) -> None:
    """Raises UserError where latents or embeddings in the shards come from other networks than this run's."""
    data = data_as_read(cfg)
    if not manifest.members.any():
        return
    fitting = np.flatnonzero(assigned(cfg, manifest, table).bucket_of_row >= 0).tolist()
    rows = first_of_each(manifest.members, fitting)
    if data.stored_latents == "use":
        if needs_pixels(cfg, vae):
            refuse_latents(manifest, rows, without_pixels(vae))
        now = made_with(cfg, vae_digest)
        drawn = data.latents == "sample"
        require_latents(manifest, rows, vae_digest, vae.latent_shape, drawn=drawn, now=now)
    if data.stored_text == "use" and isinstance(model, TextToVideo):
        digest = model.text_digest()
        require_text(
            manifest,
            rows,
            digest,
            cfg.text.trainable,
            cfg.text.max_length,
            now=made_with(cfg, vae_digest, digest),
        )


def made_with(cfg: Config, vae_digest: str, text_digest: str = "") -> Made:
    """The settings that latents, and embeddings of a frozen text encoder with that digest, depend on."""
    decoder = decoder_name(backend_of(cfg.data))
    made = {"latents": latents_made_with(vae_digest, cfg.vae.dtype, decoder)}
    if text_digest and not cfg.text.trainable:
        made["text"] = text_made_with(text_digest, cfg.text.padding, cfg.text.max_length)
    return made


def plan(
    cfg: Config,
    sources: Sources,
    table: list[BucketSpec],
    tokens_of: Callable[[Bucket], int],
    cost: Callable[[int], float],
    *,
    memory: MemoryCap | None = None,
    now: int = 0,
) -> tuple[Sources, TapeSequence, Assignment]:
    """The bucket of every clip and the tape over them, for a run whose next micro-batch is `now`.

    Where the sources have changed, new clips join at the end of the current epoch, clips that are excluded now are in
    none of its micro-batches from here on, and the last snapshot of the returned sources holds both places. Raises
    UserError where no clip fits a bucket, or a micro-batch does not fit the memory.
    """
    assignment = assigned(cfg, sources.train, table)
    if not (assignment.bucket_of_row >= 0).any():
        raise UserError(no_clip_fits(sources.train, assignment, table))
    buckets = [spec.bucket for spec in table]

    def make(change: Change, source_repeats: Sequence[SourceRepeats], first_epoch: int) -> Tape:
        bucket_of_row = assignment.bucket_of_row.copy()
        bucket_of_row[change.rows :] = NO_BUCKET
        bucket_of_row[list(change.excluded)] = NO_BUCKET
        counts = _counts(sources, bucket_of_row, len(table))
        pairs = zip(counts, source_repeats, strict=True)
        clips = [samples_per_epoch(count, source.repeats) for count, source in pairs]
        sizes = _sizes(cfg, buckets, np.sum(clips, axis=0).tolist(), tokens_of, cost, memory)
        return Tape(
            bucket_of_row,
            sources.train.shard,
            buckets,
            sizes,
            seed=cfg.seed,
            group=cfg.data.group,
            micro_batches=cfg.train.micro_batches,
            window_shards=cfg.data.window_shards,
            cost=lambda bucket: cost(tokens_of(bucket)),
            source_of_row=sources.source_of_row,
            mix=source_repeats,
            first=change.first,
            first_epoch=first_epoch,
        )

    def tape_of(joined: int) -> TapeSequence:
        changes = _changes(cfg, sources, assignment, len(table), joined)
        return TapeSequence(changes, make, exclusions_of(sources.snapshots[:joined]))

    joined = len(sources.snapshots) - sources.change
    tape = tape_of(joined)
    if sources.change:
        sources = sources.joined_at(tape.end_of_epoch(now), now)
        tape = tape_of(joined + 1)
    return sources, tape, _without(assignment, sources.snapshots[-1].excluded)


def _sizes(
    cfg: Config,
    buckets: Sequence[Bucket],
    counts: Sequence[int],
    tokens_of: Callable[[Bucket], int],
    cost: Callable[[int], float],
    memory: MemoryCap | None,
) -> dict[Bucket, int]:
    """Clips in one micro-batch of each bucket that has `counts` in an epoch."""
    return micro_batch_sizes(
        buckets,
        counts,
        tokens_of,
        cost,
        cfg.data.micro_batch,
        cfg.data.micro_batch_tokens,
        table=cfg.data.micro_batch_table,
        memory=memory,
    )


def exclusions_of(snapshots: Sequence[SourceSnapshot]) -> list[Exclusion]:
    """What each snapshot leaves out, and from which micro-batch on."""
    return [Exclusion(one.excluded_from, frozenset(one.excluded)) for one in snapshots]


def _without(assignment: Assignment, excluded: tuple[int, ...]) -> Assignment:
    """The assignment as it is from now on, where excluded clips have no bucket."""
    rows = np.array(excluded, int)
    bucket_of_row, reasons = assignment.bucket_of_row.copy(), assignment.reasons.copy()
    reasons[rows[bucket_of_row[rows] != NO_BUCKET]] = EXCLUDED
    bucket_of_row[rows] = NO_BUCKET
    return Assignment(bucket_of_row, reasons)


def _changes(
    cfg: Config, sources: Sources, assignment: Assignment, num_buckets: int, joined: int
) -> list[Change]:
    """The parts of the tape: one for each mix of `data.mix` and each of the first `joined` snapshots."""
    mixes = [(mix.from_step * cfg.train.micro_batches, mix) for mix in cfg.data.mix]
    snapshots = list(zip(sources.snapshots, sources.blocks, strict=True))[:joined]
    changes = []
    for first in sorted(
        {0, *(first for first, _ in mixes), *(snapshot.first for snapshot, _ in snapshots)}
    ):
        rows = [rows for snapshot, rows in snapshots if snapshot.first <= first][-1]
        # A mix that begins in an epoch which lost clips begins without them.
        excluded = [one.excluded for one, _ in snapshots if one.excluded_from <= first][-1]
        mix = next((mix for begin, mix in reversed(mixes) if begin <= first), None)
        if mix is None or len(sources.names) == 1:
            repeats = (1.0,) * len(sources.names)
        elif mix.weights:
            known = _without(assignment, excluded).bucket_of_row[:rows]
            clips = [int(count.sum()) for count in _counts(sources, known, num_buckets)]
            repeats = repeats_of([mix.weights.get(name, 0.0) for name in sources.names], clips)
        else:
            repeats = tuple(mix.repeats.get(name, 1.0) for name in sources.names)
        changes.append(Change(first, rows, repeats, excluded))
    return changes


def _counts(sources: Sources, bucket_of_row: np.ndarray, buckets: int) -> list[np.ndarray]:
    """Clips of each bucket, source by source."""
    source = sources.source_of_row[: len(bucket_of_row)]
    return [
        np.bincount(bucket_of_row[(source == number) & (bucket_of_row >= 0)], minlength=buckets)
        for number in range(len(sources.names))
    ]


def cost_model(cfg: Config, model: nn.Module | None = None) -> Callable[[int], float]:
    """Cost of a clip of so many tokens; a * S + b * S^2 for a transformer, a * S for the VAE.

    `data.cost_a` and `data.cost_b`, where given, are a and b. Else they are floating-point
    operations: those of `model`, or without one of the model that `cfg` describes.

    These numbers are part of the tape: a change of them changes which clips a run trains on together. So captions
    count at half of `text.max_length` and a clip as one latent frame, whatever `training_flops` counts.
    """
    a, b = cfg.data.cost_a, cfg.data.cost_b
    if a or b:
        return lambda tokens: a * tokens + b * tokens * tokens
    text_tokens = cfg.text.max_length // 2
    if model is not None and hasattr(model, "flops"):
        return lambda tokens: float(model.flops(tokens, text_tokens))
    if model is None and cfg.task == "text_to_video":
        return lambda tokens: float(trained_forward_flops(cfg.model, cfg.text, tokens, text_tokens))
    return float


def memory_cap(
    cfg: Config, vae: VideoVAE | Geometry, tokens_of: Callable[[Bucket], int]
) -> MemoryCap | None:
    """What `data.memory_gb` leaves for clips, or None without it.

    Everything comes from the config, nothing from the ranks or the machine, so that the plan is the
    same everywhere. Captions count at `text.max_length`.

    Raises:
        UserError: the task is one whose memory is not known.
    """
    if not cfg.data.memory_gb:
        return None
    if cfg.task != "text_to_video":
        raise UserError(
            f"data.memory_gb={cfg.data.memory_gb:g}: what task={cfg.task} keeps in memory is not known; set "
            "data.memory_gb=0 and choose data.micro_batch yourself"
        )
    w = sizes_in_memory.compute_bytes(cfg.parallel.param_dtype, cfg.run.device)

    def of_clip(bucket: Bucket) -> float:
        frames = vae.latent_shape(bucket.frames, bucket.height, bucket.width)[1]
        clip = sizes_in_memory.ClipSize(tokens_of(bucket), frames, cfg.text.max_length)
        return sizes_in_memory.clip_bytes(
            cfg.model, cfg.text, clip, w, cfg.run.device, cfg.parallel
        )

    fixed = sizes_in_memory.fixed_bytes(
        cfg.model,
        cfg.text,
        cfg.parallel,
        w=w,
        moments=sizes_in_memory.moment_copies(cfg.optim, cfg.model, cfg.text),
        micro_batches=cfg.train.micro_batches,
        averages=1 + len(cfg.ema.more) + len(cfg.ema.post_hoc),
    )
    return MemoryCap(cfg.data.memory_gb * GB, fixed, of_clip)


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
