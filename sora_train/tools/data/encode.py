"""Writes shards of latents, and of caption embeddings where the text encoder is frozen: `sora data encode`.

A run's own config says what is encoded: its source, buckets, VAE, text encoder and seed. Clips are cut
as epoch 0 shows them. The work has two halves. Ranks or parts encode their share of chunks into
`.latents` of the output; then one process writes the shards from there, and the output's folders appear
whole. What was killed goes on where it was: entries and folders are there in whole or not at all.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from sora_train.base.progress import Progress
from sora_train.config import Config
from sora_train.config.sections.settings import EncodeSettings
from sora_train.data.index.shard_writer import ShardWriter
from sora_train.data.index.sources import Sources
from sora_train.data.latents.cache import LatentCache, TextCache
from sora_train.data.latents.members import KIND, LATENTS, TEXT, digest, pack_latents, pack_text
from sora_train.data.latents.provenance import Made, require_same, write_made_with
from sora_train.data.loader import Loader
from sora_train.data.manifest import FILE_NAME, Manifest
from sora_train.data.sample import Failure
from sora_train.data.storage.cached_reads import read_range
from sora_train.data.storage.ranges import StorageFault, read_bytes
from sora_train.data.storage.remote import is_remote
from sora_train.data.storage.retry import ReadPolicy
from sora_train.data.tape.buckets import Assignment
from sora_train.errors import Fault, UserError
from sora_train.models.text.encoder import TextEncoder
from sora_train.models.text.published import build_text_encoder
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.runtime import world as distributed
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World
from sora_train.training.pipeline.data import open_together
from sora_train.training.pipeline.encoding import CACHE_CHUNK, CacheFiller, distinct
from sora_train.training.pipeline.plan import (
    assigned,
    bucket_table,
    cost_model,
    made_with,
    plan,
    token_counter,
)

SPLITS = ("train", "val")
CAPTIONS_KEPT = 1024
CAPTIONS_AT_ONCE = 64
_KEPT, _PARTIAL = ".latents", ".partial"


def encode(cfg: Config, settings: EncodeSettings) -> dict[str, Manifest]:
    """Write `output`/train and `output`/val; the manifests by split, held-out ones left out where there are none.

    Rows keep their numbers, so that a run on the shards draws what one on the clips draws. Ranks of
    torchrun share the encoding; the first one writes, and the others get no manifest, as does a part.

    Raises:
        UserError: an output that is not empty or was begun with other settings, a task without
            latents, a source that cannot be used, clips that no part has encoded yet.
        Fault: storage fails, or more clips are lost than `data.max_drop_fraction`.
    """
    _require(cfg, settings.folder)
    # What is encoded are clips; latents that stand beside them are made anew.
    data = cfg.data.model_copy(update={"stored_latents": "ignore", "stored_text": "ignore"})
    cfg = cfg.model_copy(update={"data": data})
    world = distributed.start(cfg.run.device, cfg.run.threads)
    control = ControlPlane(world)
    try:
        with ExitStack() as stack:
            work = _Work.begun(cfg, settings, world, control)
            splits = [stack.enter_context(split) for split in work.splits()]
            if settings.merge:
                for split in splits:
                    split.require_all()
            else:
                for split in splits:
                    _together(split.encoding(), control)
            if not (world.is_main and settings.writes):
                return {}
            return work.published(splits)
    finally:
        distributed.stop(world)


def _require(cfg: Config, output: Path) -> None:
    if cfg.task != "text_to_video":
        raise UserError(
            f"task={cfg.task} trains on pixels, so there is nothing to encode for it; name an experiment of "
            "task=text_to_video"
        )
    there = [path.name for path in output.iterdir()] if output.is_dir() else []
    # While there are entries kept the command has not ended; a split that is there is whole already.
    ours = (_KEPT, _PARTIAL, *SPLITS) if _KEPT in there else (_PARTIAL,)
    foreign = [name for name in there if name not in ours]
    if foreign or (output.exists() and not output.is_dir()):
        raise UserError(
            f"output={output} is not an empty folder ({', '.join(foreign[:3]) or 'it is a file'}); name a new one "
            "or empty it"
        )


def _together(work: Iterator[None], control: ControlPlane) -> None:
    """Run every rank's share, piece by piece beside the others', so that no rank waits long for one that failed."""
    busy = True
    while control.sum([float(busy)])[0]:
        error: Exception | None = None
        try:
            busy = busy and next(work, StopIteration) is not StopIteration
        except Exception as failure:
            error = failure
        control.raise_together(error)


@dataclass
class _Work:
    """What both splits share: the networks, the entries that are kept, and what they are made with."""

    cfg: Config
    settings: EncodeSettings
    world: World
    sources: Sources
    vae: VideoVAE
    vae_digest: str
    encoder: TextEncoder | None
    texts: TextCache
    made: Made

    @classmethod
    def begun(
        cls, cfg: Config, settings: EncodeSettings, world: World, control: ControlPlane
    ) -> "_Work":
        """Open everything. Raises UserError where the output was begun with other settings."""
        sources = open_together(cfg, control, Path(cfg.run.dir))
        vae = VideoVAE.from_config(cfg.vae).to(world.device)
        encoder, text_digest = None, ""
        if not cfg.text.trainable:
            encoder = build_text_encoder(cfg.text)
            encoder.init_weights(cfg.seed)
            encoder.to(world.device)
            text_digest = encoder.digest()
        vae_digest = vae.digest()
        made = made_with(cfg, vae_digest, text_digest)
        made["encode"] = {
            "dtype": settings.dtype,
            "keep_clips": str(settings.keep_clips).lower(),
            "data.latents": cfg.data.latents,
            "seed": str(cfg.seed),
            "clips": sources.digest(),
        }
        kept = settings.folder / _KEPT
        require_same(kept, made, "output")
        control.barrier()
        if world.is_main:
            write_made_with(kept, made)
        texts = TextCache(kept, text_digest)
        return cls(cfg, settings, world, sources, vae, vae_digest, encoder, texts, made)

    def splits(self) -> Iterator["_Split"]:
        """Those that are still to be written, the small one first."""
        manifests = {"train": self.sources.train, "val": self.sources.val}
        table = bucket_table(self.cfg, self.vae, self.cfg.model.patch_size)
        for name in reversed(SPLITS):
            has_bucket = assigned(self.cfg, manifests[name], table).bucket_of_row >= 0
            # Nothing is validated where no held-out clip fits, but there is no training without a clip.
            needed = name == "train" or bool(has_bucket.any())
            if needed and not (self.settings.folder / name).exists():
                yield _Split(self, name, manifests[name])

    def published(self, splits: list["_Split"]) -> dict[str, Manifest]:
        """Write the shards, and let the folders appear; then forget what was kept."""
        output = self.settings.folder
        partial = output / _PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        for split in splits:
            split.write(partial / split.name)
            write_made_with(partial / split.name, self.made)
        for split in splits:
            os.rename(partial / split.name, output / split.name)
        shutil.rmtree(partial, ignore_errors=True)
        # Until it is gone the command has not ended, so that it goes at once.
        os.rename(output / _KEPT, partial)
        shutil.rmtree(partial)
        present = [name for name in reversed(SPLITS) if (output / name).exists()]
        return {name: Manifest.load(output / name / FILE_NAME) for name in present}


@dataclass
class _Split:
    """The clips of one split: encodes a share of them, and writes the shards of all."""

    work: _Work
    name: str
    manifest: Manifest
    kept: LatentCache = field(init=False)
    assignment: Assignment = field(init=False)
    loader: Loader = field(init=False)

    def __post_init__(self) -> None:
        work, cfg = self.work, self.work.cfg
        self.kept = LatentCache(work.settings.folder / _KEPT)
        patch = cfg.model.patch_size
        table = bucket_table(cfg, work.vae, patch)
        _, tape, self.assignment = plan(
            cfg, Sources.of(self.manifest), table, token_counter(work.vae, patch), cost_model(cfg)
        )
        limit = {} if self.name == "train" else {"max_drop_fraction": 1.0}
        self.loader = Loader(
            self.manifest,
            tape,
            cfg.buckets,
            cfg.data.model_copy(update=limit),
            seed=cfg.seed,
            micro_batches=1,
            vae_digest=work.vae_digest,
            vae_dtype=cfg.vae.dtype,
            cache=self.kept,
            reasons=self.assignment.reasons,
            # Clips that do not decode are known to all parts, and to the one that writes.
            run_dir=work.settings.folder / _KEPT / self.name,
        )
        # The same captions often stand beside several clips.
        self.embedding = lru_cache(CAPTIONS_KEPT)(self._embedding)
        self.keys: set[str] = set()

    def __enter__(self) -> "_Split":
        return self

    def __exit__(self, *_: object) -> None:
        self.loader.close()

    # -- encoding ---------------------------------------------------------------------------------

    @property
    def chunk(self) -> int:
        """Validation encodes its clips one by one, training in chunks: the same numbers here."""
        return CACHE_CHUNK if self.name == "train" else 1

    def captions(self) -> list[str]:
        """Those whose embeddings are stored, each once."""
        if self.work.encoder is None:
            return []
        return distinct(self.manifest.caption[self.assignment.bucket_of_row >= 0].tolist())

    def encoding(self) -> Iterator[None]:
        """Encode this rank's share of this part, a piece between two yields."""
        work = self.work
        number, parts = work.settings.share
        own, shares = (number - 1) * work.world.size + work.world.rank, parts * work.world.size
        filler = CacheFiller(self.loader, work.vae, work.world.device, work.texts, work.encoder)
        chunks = self.loader.cache_chunks(self.chunk, own, shares)
        captions = [text for text in self.captions()[own::shares] if not work.texts.has(text)]
        total = sum(len(rows) for _, rows in chunks) + len(captions)
        title = f"encoding {self.name} clips"
        shown = work.world.is_main and total > 0
        with Progress(max(total, 1), title, enabled=shown) as progress:
            done = 0
            for done in filler.fill(chunks):  # noqa: B007 - the captions go on counting
                progress.update(done)
                yield
            for start in range(0, len(captions), CAPTIONS_AT_ONCE):
                some = captions[start : start + CAPTIONS_AT_ONCE]
                for caption in some:
                    filler.embed(caption)
                progress.update(done + start + len(some))
                yield

    def require_all(self) -> None:
        """Raise UserError where not all is encoded yet."""
        self.loader.quarantine.refresh()
        chunks = self.loader.cache_chunks(self.chunk)
        missing = sum(len(rows) for _, rows in chunks)
        captions = sum(not self.work.texts.has(caption) for caption in self.captions())
        if missing or captions:
            raise UserError(
                f"{missing} clips and {captions} captions of {self.name} are not encoded yet; run the missing part=, "
                "or leave merge out"
            )

    # -- writing ----------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """The shards of all clips, every row at its place, those without a bucket as dropped ones."""
        self.loader.quarantine.refresh()
        size = self.work.settings.max_shard_mb * 10**6
        source = Path(self.work.cfg.data.source).name
        total = len(self.manifest)
        with (
            ShardWriter(folder, size, prefix=self.name, source=source) as writer,
            Progress(total, f"writing {self.name} shards") as progress,
        ):
            for row in range(total):
                reason = str(self.assignment.reasons[row])
                failure = self.loader.quarantine.failure(row, 0)
                if not reason and failure:
                    reason = failure.reason
                self._write_row(writer, row, reason, failure)
                progress.update(row + 1)

    def _write_row(
        self, writer: ShardWriter, row: int, reason: str, failure: Failure | None
    ) -> None:
        work, loader = self.work, self.loader
        known = self.manifest.row(row)
        caption, _ = str(known.pop("caption")), known.pop("caption_digest")
        if reason:
            detail = failure.detail if failure else known["drop_detail"]
            writer.add_dropped(
                {**known, "caption": caption, "drop_reason": reason, "drop_detail": detail}
            )
            return
        bucket, fps = loader.tape.bucket_of(row), loader.latent_fps(row)
        latents, logvar = self._latents(row, str(known["key"]))
        packed = pack_latents(
            latents,
            vae_digest=work.vae_digest,
            fps=fps,
            pixels=bucket,
            caption=caption,
            dtype=work.settings.dtype,
            logvar=logvar,
        )
        beside = {TEXT: self.embedding(caption)} if work.encoder else {}
        key = self._key(str(known["key"]), row)
        if work.settings.keep_clips:
            extension = "mp4" if known["kind"] == "video" else "png"
            clip = self._clip(row)
            writer.write(key, clip, extension, caption, known, {**beside, LATENTS: packed})
            return
        about = {
            **known,
            "kind": KIND,
            "codec": KIND,
            "frames": bucket.frames,
            "fps": fps,
            "vfr": False,
            "height": bucket.height,
            "width": bucket.width,
            "rotation": 0,
            "duration": bucket.frames / fps if fps else 0.0,
            "start": 0.0,
            "sample_digest": digest(lambda at, count: packed[at : at + count], len(packed)),
            "unverified": False,
            "traits": "",
            "coding": "",
        }
        writer.write(key, packed, LATENTS, caption, about, beside)

    def _latents(self, row: int, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        key, drawn = self.loader.latent_key(row), self.loader.drawn
        latents, logvar = self.kept.get(key), self.kept.get(key, True) if drawn else None
        if latents is None or (drawn and logvar is None):
            raise Fault(
                f"the encoded latents of {name!r} are missing from {self.kept.folder}; run it again"
            )
        return latents, logvar

    def _key(self, name: str, row: int) -> str:
        """A key of its own: webdataset ends keys at the first dot, and a source may number each shard anew."""
        key = name.replace("/", "-").replace(".", "-")
        if key in self.keys:
            key = f"{key}-row{row}"
        self.keys.add(key)
        return key

    def _clip(self, row: int) -> bytes:
        """The clip's own bytes."""
        manifest = self.manifest
        path, offset, length = (
            manifest.path(row),
            int(manifest.offset[row]),
            int(manifest.length[row]),
        )
        try:
            if is_remote(path):
                data = self.work.cfg.data
                policy = ReadPolicy(data.read_retries, data.read_timeout)
                return read_range(path, offset, length, policy)
            return read_bytes(path, offset, length)
        except StorageFault as error:
            raise Fault(f"the clip {manifest.key[row]!r} cannot be read: {error}") from error

    def _embedding(self, caption: str) -> bytes:
        embedding = self.work.texts.get(caption)
        if embedding is None:
            raise Fault(
                f"the embedding of {caption[:80]!r} is missing from {self.kept.folder}; run it again"
            )
        texts = self.work.texts
        return pack_text(
            embedding,
            encoder_digest=texts.encoder_digest,
            caption=caption,
            dtype=self.work.settings.dtype,
        )
