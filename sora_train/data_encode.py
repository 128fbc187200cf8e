"""Writes shards of latents, and of caption embeddings where the text encoder is frozen: `sora data encode`.

A run's own config says what is encoded: its source, buckets, VAE, text encoder and seed. Clips are cut
as epoch 0 shows them. What is encoded is kept in `.latents` of the output until all shards are
written, so that a command cut off goes on where it was; the output's folders appear whole.
"""

import os
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from sora_train.config import Config
from sora_train.data.cache import LatentCache
from sora_train.data.decode import StorageFault
from sora_train.data.loader import Loader
from sora_train.data.manifest import Manifest
from sora_train.data.reading import read_range
from sora_train.data.remote import is_remote
from sora_train.data.retry import ReadPolicy
from sora_train.data.sample import Failure
from sora_train.data.shards import ShardWriter, read_bytes
from sora_train.data.stored import KIND, LATENTS, TEXT, digest, pack_latents, pack_text
from sora_train.distributed import World, pick_device
from sora_train.errors import Fault, UserError
from sora_train.models.text import TextEncoder
from sora_train.models.vae import VideoVAE
from sora_train.progress import Progress
from sora_train.training_data import CACHE_CHUNK, fill_cache
from sora_train.training_plan import assigned, bucket_table, cost_model, plan, token_counter
from sora_train.training_sources import Sources, open_sources

DTYPES = ("float32", "bfloat16", "float16")
SPLITS = ("train", "val")
CAPTIONS_KEPT = 1024
_KEPT, _PARTIAL = ".latents", ".partial"


@dataclass(frozen=True)
class EncodeRequest:
    """The command's own settings: where the shards go, and what they hold."""

    output: Path
    keep_clips: bool = False
    dtype: str = "float32"
    max_shard_mb: int = 512

    @classmethod
    def parse(cls, arguments: list[str]) -> tuple["EncodeRequest", list[str]]:
        """The request, and the arguments that are a run's overrides. Raises UserError naming the argument."""
        own = {"output": "", "keep_clips": "false", "dtype": "float32", "max_shard_mb": "512"}
        rest = []
        for text in arguments:
            key, equals, value = text.partition("=")
            if equals and key in own:
                own[key] = value
            else:
                rest.append(f"data.{text}" if text.startswith("source=") else text)
        if not own["output"]:
            raise UserError("output= is not given; name a folder for the shards, new or empty")
        if own["keep_clips"].lower() not in ("true", "false"):
            raise UserError(f"keep_clips={own['keep_clips']} is neither true nor false")
        if own["dtype"] not in DTYPES:
            raise UserError(f"dtype={own['dtype']} is none of {', '.join(DTYPES)}")
        if not own["max_shard_mb"].isdigit() or int(own["max_shard_mb"]) < 1:
            raise UserError(f"max_shard_mb={own['max_shard_mb']} is not a size in MB, such as 512")
        keep = own["keep_clips"].lower() == "true"
        output = Path(own["output"]).expanduser()
        return cls(output, keep, own["dtype"], int(own["max_shard_mb"])), rest


def encode(cfg: Config, request: EncodeRequest) -> dict[str, Manifest]:
    """Write `output`/train and `output`/val; the manifests by split, held-out ones left out where there are none.

    Rows keep their numbers, so that a run on the shards draws what one on the clips draws.

    Raises:
        UserError: an output that is not empty, a task without latents, a source that cannot be used.
        Fault: storage fails, or more clips are lost than `data.max_drop_fraction`.
    """
    _require(cfg, request.output)
    # What is encoded are clips; latents that stand beside them are made anew.
    data = cfg.data.model_copy(update={"stored_latents": "ignore", "stored_text": "ignore"})
    cfg = cfg.model_copy(update={"data": data})
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    device = pick_device(cfg.run.device)
    sources = open_sources(cfg, Path(cfg.run.dir))
    found = {"train": sources.train, "val": sources.val}
    vae = VideoVAE.from_config(cfg.vae).to(device)
    text = None
    if not cfg.text.trainable:
        text = TextEncoder(cfg.text)
        text.init_weights(cfg.seed)
        text.to(device)
    partial = request.output / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    written = {}
    for split in reversed(SPLITS):
        # Nothing is validated where no held-out clip fits, but there is no training without a clip.
        if split == "train" or _fitting(cfg, found[split], vae):
            writer = _Encoder(cfg, request, split, vae, text, device)
            written[split] = writer.write(found[split], partial / split)
    for split in written:
        os.rename(partial / split, request.output / split)
    for folder in (partial, request.output / _KEPT):
        shutil.rmtree(folder)
    return {split: Manifest.load(request.output / split / "manifest.parquet") for split in written}


def _require(cfg: Config, output: Path) -> None:
    if cfg.task != "text_to_video":
        raise UserError(
            f"task={cfg.task} trains on pixels, so there is nothing to encode for it; name an experiment of "
            "task=text_to_video"
        )
    there = [path.name for path in output.iterdir()] if output.is_dir() else []
    foreign = [name for name in there if name not in (_KEPT, _PARTIAL)]
    if foreign or (output.exists() and not output.is_dir()):
        raise UserError(
            f"output={output} is not an empty folder ({', '.join(foreign[:3]) or 'it is a file'}); name a new one "
            "or empty it"
        )


def _fitting(cfg: Config, manifest: Manifest, vae: VideoVAE) -> int:
    table = bucket_table(cfg, vae, cfg.model.patch_size)
    return int((assigned(cfg, manifest, table).bucket_of_row >= 0).sum())


class _Encoder:
    """Encodes a split's clips and writes their shards."""

    def __init__(
        self,
        cfg: Config,
        request: EncodeRequest,
        split: str,
        vae: VideoVAE,
        text: TextEncoder | None,
        device: torch.device,
    ):
        self.cfg, self.request, self.split, self.vae = cfg, request, split, vae
        self.vae_digest = vae.digest()
        self.encoder = text
        self.text_digest = text.digest() if text else ""
        self.world = World(0, 1, 0, 1, device, owns_group=False)
        self.kept = LatentCache(request.output / _KEPT)
        # The same captions often stand beside several clips.
        self.embedding = lru_cache(CAPTIONS_KEPT)(self._embedding)
        self.keys: set[str] = set()

    def write(self, manifest: Manifest, folder: Path) -> Manifest:
        """The shards of a manifest's clips, every row at its place, those without a bucket as dropped ones."""
        cfg, patch = self.cfg, self.cfg.model.patch_size
        table = bucket_table(cfg, self.vae, patch)
        _, tape, assignment = plan(
            cfg, Sources.of(manifest), table, token_counter(self.vae, patch), cost_model(cfg)
        )
        limit = {} if self.split == "train" else {"max_drop_fraction": 1.0}
        with Loader(
            manifest, tape, cfg.buckets, cfg.data.model_copy(update=limit), seed=cfg.seed, micro_batches=1,
            vae_digest=self.vae_digest, cache=self.kept, reasons=assignment.reasons,
        ) as loader:  # fmt: skip
            # Validation encodes its clips one by one, training in chunks: the same numbers here.
            size = CACHE_CHUNK if self.split == "train" else 1
            fill_cache(loader, self.vae, self.world, f"encoding {self.split} clips", size)
            source = Path(cfg.data.source).name
            with (
                ShardWriter(
                    folder, self.request.max_shard_mb * 10**6, prefix=self.split, source=source
                ) as writer,
                Progress(len(manifest), f"writing {self.split} shards") as progress,
            ):
                for row in range(len(manifest)):
                    reason = str(assignment.reasons[row])
                    failure = loader.quarantine.failure(row, 0)
                    if not reason and failure:
                        reason = failure.reason
                    self._write_row(writer, loader, row, reason, failure)
                    progress.update(row + 1)
        return Manifest.load(folder / "manifest.parquet")

    def _write_row(
        self, writer: ShardWriter, loader: Loader, row: int, reason: str, failure: Failure | None
    ) -> None:
        manifest = loader.manifest
        known = manifest.row(row)
        caption, _ = str(known.pop("caption")), known.pop("caption_digest")
        if reason:
            detail = failure.detail if failure else known["drop_detail"]
            writer.add_dropped(
                {**known, "caption": caption, "drop_reason": reason, "drop_detail": detail}
            )
            return
        bucket, fps = loader.tape.bucket_of(row), loader.latent_fps(row)
        latents = self.kept.get(loader.latent_key(row))
        if latents is None:
            raise Fault(
                f"the encoded latents of {known['key']!r} are missing from {self.kept.folder}; run it again"
            )
        packed = pack_latents(
            latents, vae_digest=self.vae_digest, fps=fps, pixels=bucket, caption=caption, dtype=self.request.dtype,
        )  # fmt: skip
        beside = {TEXT: self.embedding(caption)} if self.encoder else {}
        key = self._key(str(known["key"]), row)
        if self.request.keep_clips:
            extension = "mp4" if known["kind"] == "video" else "png"
            clip = self._clip(manifest, row)
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
        }
        writer.write(key, packed, LATENTS, caption, about, beside)

    def _key(self, name: str, row: int) -> str:
        """A key of its own: webdataset ends keys at the first dot, and a source may number each shard anew."""
        key = name.replace("/", "-").replace(".", "-")
        if key in self.keys:
            key = f"{key}-row{row}"
        self.keys.add(key)
        return key

    def _clip(self, manifest: Manifest, row: int) -> bytes:
        """The clip's own bytes."""
        path, offset, length = (
            manifest.path(row),
            int(manifest.offset[row]),
            int(manifest.length[row]),
        )
        try:
            if is_remote(path):
                data = self.cfg.data
                policy = ReadPolicy(data.read_retries, data.read_timeout)
                return read_range(path, offset, length, policy)
            return read_bytes(manifest.root, str(manifest.shard[row]), offset, length)
        except StorageFault as error:
            raise Fault(f"the clip {manifest.key[row]!r} cannot be read: {error}") from error

    def _embedding(self, caption: str) -> bytes:
        assert self.encoder is not None
        embedding = self.encoder.embedding(caption).float().cpu().numpy()
        return pack_text(
            np.asarray(embedding), encoder_digest=self.text_digest, caption=caption, dtype=self.request.dtype,
        )  # fmt: skip
