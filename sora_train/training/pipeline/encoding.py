"""Fills the cache with the outputs of frozen networks: before step 1, or as clips are trained.

Before step 1 clips are encoded in chunks that are cut from the manifest, so that stored latents depend
on neither the world size nor on where a run was cut off. In training they are encoded one by one, as
without a cache: the numbers of a clip's first step are then exactly those of an uncached run.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sora_train.base.progress import Progress
from sora_train.config import Config
from sora_train.data.latents.cache import LatentCache, TextCache
from sora_train.data.latents.provenance import require_same, write_made_with
from sora_train.data.loader import Chunk, Loader
from sora_train.data.manifest import text_digest
from sora_train.data.sample import Clip, ClipBatch
from sora_train.errors import UserError
from sora_train.models.text.encoder import TextEncoder
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import to_pixels
from sora_train.objectives.posterior import encode_posterior
from sora_train.runtime.world import World
from sora_train.training.pipeline.plan import made_with

CACHE_CHUNK = 16


@dataclass(frozen=True)
class Caches:
    """Where latents are stored, and the embeddings of the frozen text encoder; None: nowhere."""

    latents: LatentCache | None = None
    texts: TextCache | None = None
    encoder: TextEncoder | None = None


def open_caches(
    cfg: Config, vae_digest: str, model: nn.Module | None, own_folder: Path, world: World
) -> Caches:
    """The caches of a run that wants some, in `data.cache_dir` or a folder of its own.

    Entries of other settings in the run's own folder are ignored. Raises UserError where the folder
    `data.cache_dir` was filled with other settings.
    """
    if cfg.data.cache == "none" or cfg.task != "text_to_video":
        return Caches()
    frozen = model if isinstance(model, TextToVideo) and not cfg.text.trainable else None
    digest = frozen.text_digest() if frozen else ""
    made = made_with(cfg, vae_digest, digest)
    folder = Path(cfg.data.cache_dir).expanduser() if cfg.data.cache_dir else own_folder
    if cfg.data.cache_dir:
        require_same(folder, made, "data.cache_dir")
    # A dry run writes nothing.
    if world.is_main and not cfg.dry_run:
        write_made_with(folder, made)
    if frozen is None:
        return Caches(LatentCache(folder))
    texts = TextCache(folder, digest, cfg.data.cache_text_gb * 1e9)
    return Caches(LatentCache(folder), texts, frozen.frozen_encoder)


class CacheFiller:
    """Encodes clips and captions that are not in the cache on this rank's device, and stores them.

    Latents are stored by the loader, with their log-variance where `data.latents=sample`; embeddings
    in `texts`, made by `text`, the frozen encoder, as far as there is room.
    """

    def __init__(
        self,
        loader: Loader,
        vae: VideoVAE,
        device: torch.device,
        texts: TextCache | None = None,
        text: TextEncoder | None = None,
    ):
        self.loader, self.vae, self.device = loader, vae, device
        self.texts, self.text = texts, text
        self._seconds = 0.0

    def take_seconds(self) -> float:
        """Seconds that encoding has taken since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds += time.monotonic() - began

    @torch.no_grad()
    def encode(self, clips: Sequence[Clip]) -> list[Clip]:
        """Clips of one shape with their latents instead of pixels, encoded together."""
        # It may rest on the host (memory.encode_first).
        self.vae.to(self.device)
        pixels = to_pixels(list(clips), self.device)
        if not self.loader.drawn:
            means = _array(self.vae.encode(pixels))
            return [
                replace(clip, pixels=None, latents=mean)
                for clip, mean in zip(clips, means, strict=True)
            ]
        means, logvars = map(_array, encode_posterior(self.vae, pixels))
        return [
            replace(clip, pixels=None, latents=mean, logvar=logvar)
            for clip, mean, logvar in zip(clips, means, logvars, strict=True)
        ]

    def store(self, clips: Sequence[Clip]) -> list[Clip]:
        """`encode`, and into the cache."""
        with self._timed():
            encoded = self.encode(clips)
        for clip in encoded:
            assert clip.latents is not None
            self.loader.store(clip.row, clip.latents, clip.logvar)
        return encoded

    def fill(self, chunks: Sequence[Chunk]) -> Iterator[int]:
        """Encode chunk by chunk; after each, how many clips are done."""
        done = 0
        for _, clips, failures in self.loader.chunks(chunks):
            if clips:
                self.store(clips)
            done += len(clips) + len(failures)
            yield done

    def embed(self, caption: str) -> np.ndarray:
        """A caption's embedding (L, D), float32: the stored one, or made now and stored."""
        assert self.texts is not None and self.text is not None
        stored = self.texts.get(caption)
        if stored is not None:
            return stored
        with self._timed():
            embedding = self.text.to(self.device).embedding(caption)
            values = _array(embedding)
        self.texts.put(caption, values, _stored_as(embedding.dtype))
        return values

    def lacks(self, clip: Clip) -> bool:
        """Whether a clip is without latents or an embedding that the cache may hold."""
        return clip.latents is None or (self.texts is not None and clip.text is None)

    def filled(self, batch: ClipBatch) -> ClipBatch:
        """A micro-batch, its clips that are not stored yet encoded one by one and stored."""
        clips = [self.with_text(self.with_latents(clip)) for clip in batch.clips]
        return replace(batch, clips=clips)

    def with_latents(self, clip: Clip) -> Clip:
        """A clip with its latents; what was decoded ahead may have been stored since then."""
        if clip.latents is not None:
            return clip
        cached = self.loader.cached(clip.row)
        if cached is None:
            return self.store([clip])[0]
        return replace(clip, pixels=None, latents=cached[0], logvar=cached[1])

    def with_text(self, clip: Clip) -> Clip:
        """A clip with the embedding of its caption, where embeddings are stored."""
        if clip.text is not None or self.texts is None:
            return clip
        return replace(clip, text=self.embed(clip.caption))


def open_filler(
    cfg: Config, loader: Loader, vae: VideoVAE, device: torch.device, caches: Caches
) -> CacheFiller | None:
    """The filler of a run's caches; None without caches and in a dry run."""
    if caches.latents is None or cfg.dry_run:
        return None
    return CacheFiller(loader, vae, device, caches.texts, caches.encoder)


def fill_cache(
    filler: CacheFiller, world: World, title: str, stop: Callable[[], bool] = lambda: False
) -> None:
    """Encode every clip that is not stored yet, chunk by chunk, the chunks dealt out over the ranks.

    `stop` is asked after every chunk; what was encoded stays.
    """
    chunks = filler.loader.cache_chunks(CACHE_CHUNK, world.rank, world.size)
    total = sum(len(rows) for _, rows in chunks)
    with Progress(max(total, 1), title, enabled=world.is_main and total > 0) as progress:
        for done in filler.fill(chunks):
            progress.update(done)
            if stop():
                return


def embed_captions(
    filler: CacheFiller,
    captions: Sequence[str],
    world: World,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Store the embedding of every caption that is not stored yet, dealt out over the ranks; `stop` is asked after
    each. Nothing is to be done for an encoder that is trained. Raises UserError where the cache has no room for one."""
    texts = filler.texts
    if texts is None:
        return
    own = [caption for caption in captions[world.rank :: world.size] if not texts.has(caption)]
    with Progress(
        max(len(own), 1), "encoding captions", enabled=world.is_main and bool(own)
    ) as bar:
        for done, caption in enumerate(own, 1):
            filler.embed(caption)
            if not texts.has(caption):
                raise UserError(
                    f"memory.encode_first=true: the cache is full after {done - 1} of {len(own)} captions; raise "
                    "data.cache_text_gb"
                )
            bar.update(done)
            if stop():
                return


def distinct(captions: Sequence[str]) -> list[str]:
    """The captions, each once, in an order that does not depend on theirs."""
    return sorted(set(captions), key=text_digest)


def _array(values: torch.Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


def _stored_as(dtype: torch.dtype) -> str:
    """A type that loses nothing."""
    name = str(dtype).removeprefix("torch.")
    return name if name in ("bfloat16", "float16") else "float32"
