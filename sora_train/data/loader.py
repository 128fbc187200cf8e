"""Reads the clips of the tape ahead of time and delivers them in order, a `ClipBatch` for each micro-batch.

`_begin` chooses the source of a row. Pixels: `request` names frames and crop, a decode process answers,
`_clip` adds the caption. Latents: `_read_stored` reads those in the shard, `_read_latents` those of the
cache. `_collect` waits for the rows of a micro-batch.

The delivered clips depend on the tape and the quarantine alone. Workers and prefetch only decide when
they are ready. A sample that fails is reported as a Failure, never replaced.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sora_train.config import BucketsConfig, DataConfig
from sora_train.data import quarantine
from sora_train.data.captions.choice import CaptionChoice, require_captions
from sora_train.data.decode import decord as decode_decord
from sora_train.data.decode import torchcodec as decode_torchcodec
from sora_train.data.decode.frames import DecodeRequest
from sora_train.data.decode.pool import DecodePool, worker_of
from sora_train.data.decode.probe import ALPHA
from sora_train.data.exclusion import EXCLUDED
from sora_train.data.index import decoders
from sora_train.data.latents import members as stored
from sora_train.data.latents.cache import LatentCache, TextCache, latent_key
from sora_train.data.latents.provenance import decoder_name
from sora_train.data.manifest import Manifest, text_digest
from sora_train.data.sample import Bucket, Clip, ClipBatch, Failure, MicroBatch
from sora_train.data.storage.cached_reads import require
from sora_train.data.storage.ranges import StorageFault
from sora_train.data.storage.remote import is_remote
from sora_train.data.storage.retry import ReadPolicy
from sora_train.data.tape.tape import TapeLike, rows_for_rank
from sora_train.data.transforms import crop, uniform, window
from sora_train.errors import Fault, UserError

# Reading stored latents waits for the disk, not for a core.
_CACHE_THREADS = 2
_POLL_SECONDS = 1.0

Chunk = tuple[Bucket, tuple[int, ...]]


class Loader:
    """The clips of a rank's micro-batches, step by step. Close it, or use it as a context manager.

    `micro_batches` counts those of one step over all ranks. With a `cache` the stored latents are
    delivered where there are any, windows and crops are those of epoch 0 in every epoch, and
    `vae_digest` and `vae_dtype` name the VAE of the latents; `texts` are the caption embeddings stored
    beside them. `reasons` are those of `buckets.assign` (default: the manifest's). Failures are recorded
    in `run_dir`; of ranks that read the same micro-batches only the one with `is_cp_leader` does so.

    Raises UserError where too many clips are unusable, the decoder cannot read them, a package for
    their storage is missing, or no clip has a weighted caption.
    """

    def __init__(
        self,
        manifest: Manifest,
        tape: TapeLike,
        buckets_cfg: BucketsConfig,
        data_cfg: DataConfig,
        *,
        seed: int,
        micro_batches: int,
        rank: int = 0,
        world_size: int = 1,
        vae_digest: str = "",
        vae_dtype: str = "float32",
        cache: LatentCache | None = None,
        texts: TextCache | None = None,
        run_dir: Path | str | None = None,
        reasons: np.ndarray | None = None,
        is_cp_leader: bool = True,
    ):
        self.manifest, self.tape = manifest, tape
        self._fps = buckets_cfg.fps
        self._cfg = data_cfg
        self._seed, self._micro_batches = seed, micro_batches
        self._rank, self._world_size, self.is_cp_leader = rank, world_size, is_cp_leader
        self._vae_digest, self._vae_dtype = vae_digest, vae_dtype
        self._cache, self._texts = cache, texts
        self.drawn = data_cfg.latents == "sample"
        self._backend = _backend(data_cfg, manifest, tape)
        self._others = decoders.installed() if data_cfg.decoder == "auto" else []
        require_captions(manifest, data_cfg.caption_weights)
        self._captions = CaptionChoice(
            seed, data_cfg.caption_weights, data_cfg.caption_field_dropout
        )
        self._reading = ReadPolicy(
            data_cfg.read_retries,
            data_cfg.read_timeout,
            data_cfg.disk_cache_dir,
            int(data_cfg.disk_cache_gb * 1e9),
            block_bytes=max(1, int(data_cfg.read_block_mb * 1e6)),
        )
        require(set(manifest.shard.tolist()), data_cfg.disk_cache_dir)
        reasons = manifest.drop_reason if reasons is None else reasons
        lost = reasons[(reasons != "") & (reasons != EXCLUDED)]
        names, counts = np.unique(lost.astype(str), return_counts=True)
        self.quarantine = quarantine.Quarantine(
            Path(run_dir) / quarantine.FILE_NAME if run_dir is not None else None,
            total=len(manifest),
            limit=data_cfg.max_drop_fraction,
            dropped=dict(zip(names.tolist(), counts.tolist(), strict=True)),
        )
        self.wait_seconds = 0.0
        """Seconds that callers of `step` and `chunks` waited in all."""
        # By micro-batch: the futures of its rows, and the bytes it takes once read.
        self._pending: dict[int, tuple[list[Future], int]] = {}
        self._pool = DecodePool(
            data_cfg.num_workers, data_cfg.decode_timeout, module=worker_of(self.program)
        )
        self._readers = ThreadPoolExecutor(_CACHE_THREADS, thread_name_prefix="latents")

    # -- training -----------------------------------------------------------------------------

    def step(self, step: int) -> list[ClipBatch]:
        """This rank's micro-batches of a step, in the order of the tape; reading of the next ones begins.

        Every rank gets the same number of slots. Raises Fault when storage fails or too many clips
        are lost.
        """
        began = time.monotonic()
        entries = self._entries(step)
        self._prefetch(step, entries)
        batches = [
            self.idle(step)
            if entry is None
            else self._collect(step, entry, self._pending.pop(entry.index)[0])
            for entry in entries
        ]
        self.wait_seconds += time.monotonic() - began
        return batches

    def _entries(self, step: int) -> list[MicroBatch | None]:
        return rows_for_rank(self.tape, step, self._micro_batches, self._rank, self._world_size)

    def _prefetch(self, step: int, entries: list[MicroBatch | None]) -> None:
        """Begin the micro-batches of a step and, as far as there is room, the next ones; cancel all others."""
        needed = {entry.index: (entry, self._bytes(entry)) for entry in entries if entry}
        room = self._cfg.prefetch_mb * 1e6
        for entry in itertools.islice(self._after(step), self._cfg.prefetch):
            size = self._bytes(entry)
            room -= size
            if room < 0:
                break
            needed[entry.index] = (entry, size)
        for index in self._pending.keys() - needed.keys():
            for future in self._pending.pop(index)[0]:
                future.cancel()
        for index, (entry, size) in needed.items():
            if index not in self._pending:
                rows = zip(entry.rows, entry.epochs, strict=True)
                self._pending[index] = [self._begin(row, epoch, step) for row, epoch in rows], size

    def _after(self, step: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches after a step, in the order of the tape."""
        for ahead in itertools.count(step + 1):
            entries = self._entries(ahead)
            if not any(entries):
                return
            yield from filter(None, entries)

    def _bytes(self, entry: MicroBatch) -> int:
        """Bytes of a micro-batch once read: stored latents count as their files, other clips as pixels."""
        if entry.index in self._pending:
            return self._pending[entry.index][1]
        total = 0
        for row in entry.rows:
            size = None
            if self._cache is not None:
                size = self._cache.size(self.latent_key(row), self.drawn)
            total += _pixel_bytes(self.tape.bucket_of(row)) if size is None else size
        return total

    def settle(self) -> int:
        """Wait until everything that is read ahead is there; the index of its last micro-batch, -1 for none."""
        for index, (futures, _) in self._pending.items():
            for row, future in zip(self.tape[index].rows, futures, strict=True):
                self._wait(row, future)
        return max(self._pending, default=-1)

    def rows_at(self, step: int) -> list[int]:
        """The rows of this rank's micro-batches of a step."""
        return [row for entry in self.micro_batches_at(step) for row in entry.rows]

    def micro_batches_at(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step, as the tape has them."""
        return [entry for entry in self._entries(step) if entry]

    def stacks(self) -> str:
        """The stacks of the decode processes."""
        return self._pool.stacks()

    def idle(self, step: int) -> ClipBatch:
        """A slot without clips, in the bucket of the step's first micro-batch so that it takes no longer."""
        peer = self.tape[step * self._micro_batches]
        return ClipBatch(MicroBatch(peer.index, peer.bucket, peer.epoch, (), ()), [], [], 0.0)

    def _collect(self, step: int, entry: MicroBatch, futures: Sequence[Future]) -> ClipBatch:
        self.quarantine.refresh()
        clips, failures = self._gather(entry.rows, futures, step, on_disk=self.is_cp_leader)
        return ClipBatch(entry, clips, failures, float(len(clips)))

    # -- stored latents -----------------------------------------------------------------------

    def cache_chunks(self, size: int, part: int = 0, parts: int = 1) -> list[Chunk]:
        """The rows to encode before training from latents: chunks of `size` clips of a bucket.

        The chunks cover all trained rows in the manifest's order, stored or not, so that latents do
        not depend on where an earlier run stopped. They are dealt out over `parts` first; then
        chunks are left out whose clips are all stored or failed. So parts that call this at
        different times share the same deal.
        """
        chunks: list[Chunk] = []
        of_row = self.tape.bucket_of_row[self.tape.rows]
        for number, bucket in enumerate(self.tape.buckets):
            rows = self.tape.rows[of_row == number].tolist()
            rows = [row for row in rows if self._stored_latents(row) is None]
            chunks += [
                (bucket, tuple(rows[start : start + size])) for start in range(0, len(rows), size)
            ]

        def is_done(row: int) -> bool:
            return self.is_cached(row) or self.quarantine.failure(row, 0) is not None

        return [chunk for chunk in chunks[part::parts] if not all(map(is_done, chunk[1]))]

    def chunks(self, chunks: Sequence[Chunk]) -> Iterator[tuple[Bucket, list[Clip], list[Failure]]]:
        """The pixels of chunks in order, while the next ones are decoded.

        Failures are recorded as of step 0, so such a clip is never trained.
        """
        begun: list[list[Future]] = []
        for position, (bucket, rows) in enumerate(chunks):
            room = self._cfg.prefetch_mb * 1e6
            for at in range(position, min(len(chunks), position + 1 + self._cfg.prefetch)):
                bucket_ahead, rows_ahead = chunks[at]
                if at > position:
                    room -= _pixel_bytes(bucket_ahead) * len(rows_ahead)
                if room < 0:
                    break
                if at == position + len(begun):
                    begun.append([self._decode(row, 0) for row in rows_ahead])
            began = time.monotonic()
            clips, failures = self._gather(rows, begun.pop(0), step=0)
            self.wait_seconds += time.monotonic() - began
            yield bucket, clips, failures

    def decode_rows(self, rows: Sequence[int]) -> tuple[list[Clip], list[Failure]]:
        """Trained rows as in epoch 0 (for validation): pixels, or the latents in the shards."""
        begun = [
            self._decode(row, 0)
            if self._stored_latents(row) is None
            else self._readers.submit(self._read_stored, row, 0)
            for row in rows
        ]
        return self._gather(rows, begun, step=0)

    def read_rows(self, rows: Sequence[int]) -> tuple[list[Clip], list[Failure]]:
        """Trained rows as training reads them in epoch 0: latents and embeddings where they are stored."""
        return self._gather(rows, [self._begin(row, 0, 0) for row in rows], step=0)

    def _gather(
        self, rows: Sequence[int], futures: Sequence[Future], step: int, *, on_disk: bool = True
    ) -> tuple[list[Clip], list[Failure]]:
        """Wait for the clips of rows at a step, and record their failures."""
        clips: list[Clip] = []
        failures: list[Failure] = []
        for row, future in zip(rows, futures, strict=True):
            result = self.quarantine.failure(row, step) or self._wait(row, future)
            if isinstance(result, Failure):
                failures.append(result)
                self.record(step, result, on_disk=on_disk)
            else:
                clips.append(result)
        return clips, failures

    def latent_key(self, row: int) -> str:
        """The cache's key of a row's latents."""
        times, _, box = self._cut(row, 0)
        return latent_key(
            str(self.manifest.sample_digest[row]),
            self.tape.bucket_of(row),
            times,
            box,
            self._vae_digest,
            dtype=self._vae_dtype,
            decoder=decoder_name(self._backend_of(row)),
            treated=self._treated(row),
        )

    def latent_fps(self, row: int) -> float:
        """The frame rate of a row's cached latents, 0 for a single frame."""
        return self._cut(row, 0)[1]

    def is_cached(self, row: int) -> bool:
        return self._cache is not None and self._cache.has(self.latent_key(row), self.drawn)

    def cached(self, row: int) -> tuple[np.ndarray, np.ndarray | None] | None:
        """A row's latents in the cache, and their log-variance where `data.latents=sample`."""
        if self._cache is None:
            return None
        key = self.latent_key(row)
        latents, logvar = self._cache.get(key), self._cache.get(key, True) if self.drawn else None
        return None if latents is None or (self.drawn and logvar is None) else (latents, logvar)

    def store(self, row: int, latents: np.ndarray, logvar: np.ndarray | None = None) -> None:
        """Store a row's latents, float32 (C, T', H', W'), and their log-variance where `data.latents=sample`."""
        assert self._cache is not None, "the loader was built without a cache"
        self._cache.put(self.latent_key(row), latents, logvar)

    # -- one clip -----------------------------------------------------------------------------

    def _cut(
        self, row: int, epoch: int
    ) -> tuple[tuple[float, ...], float, tuple[float, float, float, float]]:
        """Times, their rate, and crop of a sample: keyed by its epoch, or fixed where latents are stored."""
        manifest, bucket = self.manifest, self.tape.bucket_of(row)
        epoch = 0 if self._cache is not None else epoch
        u = uniform(self._seed, "window", epoch, row)
        frames, rate = int(manifest.frames[row]), float(manifest.fps[row])
        times, fps = window(frames, rate, bucket, self._fps, u)
        u_x, u_y = (uniform(self._seed, "crop", epoch, row, axis) for axis in "xy")
        height, width = int(manifest.height[row]), int(manifest.width[row])
        return times, fps, crop(height, width, bucket, u_x, u_y)

    def _begin(self, row: int, epoch: int, step: int) -> Future:
        if failure := self.quarantine.failure(row, step):
            known: Future = Future()
            known.set_result(failure)
            return known
        if self._stored_latents(row) is not None:
            return self._readers.submit(self._read_stored, row, epoch)
        if self._cache is not None:
            return self._readers.submit(self._read_latents, row, epoch)
        return self._decode(row, epoch)

    def _stored_latents(self, row: int) -> stored.StoredLatents | None:
        """The latents in the row's shard, where they have the shape of its bucket and are not ignored."""
        if self._cfg.stored_latents == "ignore":
            return None
        latents, _ = stored.stored_of(self.manifest.members[row])
        return latents if latents and latents.pixels == self.tape.bucket_of(row) else None

    def _read_stored(self, row: int, epoch: int) -> Clip | Failure:
        """The latents in the row's shard as a clip. Raises Fault where storage fails."""
        place = self._stored_latents(row)
        assert place is not None
        member = self._member(row, place, stored.LATENTS)
        if isinstance(member, Failure):
            return member
        latents, logvar = member
        clip = self._clip(row, epoch, None, latents, place.fps)
        return self.with_text(dataclasses.replace(clip, logvar=logvar))

    def with_text(self, clip: Clip) -> Clip | Failure:
        """The clip with the embedding of its caption from its shard or the cache, where there is one."""
        place = self._stored_text(clip)
        if place is None:
            text = self._texts.get(clip.caption) if self._texts is not None else None
            return clip if text is None else dataclasses.replace(clip, text=text)
        member = self._member(clip.row, place, stored.TEXT)
        return member if isinstance(member, Failure) else dataclasses.replace(clip, text=member[0])

    def _stored_text(self, clip: Clip) -> stored.StoredText | None:
        """The place of the embedding of exactly this caption."""
        if self._cfg.stored_text == "ignore":
            return None
        _, text = stored.stored_of(self.manifest.members[clip.row])
        return text if text and text.caption_digest == text_digest(clip.caption) else None

    def _member(
        self, row: int, place: stored.StoredLatents | stored.StoredText, extension: str
    ) -> tuple[np.ndarray, np.ndarray | None] | Failure:
        stamp = self.manifest.shards.get(str(self.manifest.shard[row]))
        path = self.manifest.path(row)
        try:
            return stored.read_member(path, place, extension, self._reading, stamp)
        except stored.DamagedMember as error:
            return Failure(row, "stored_damaged", str(error))
        except StorageFault as error:
            raise Fault(
                f"cannot read {extension} of {self.manifest.key[row]!r} at byte {place.offset}: {error}; check the "
                "storage, or index the source again if its files changed"
            ) from error

    def _read_latents(self, row: int, epoch: int) -> Clip | Failure | Future:
        """The cached latents as a clip; the future of its pixels where they are gone."""
        cached = self.cached(row)
        if cached is None:
            return self._decode(row, epoch)
        latents, logvar = cached
        clip = self._clip(row, epoch, None, latents)
        return self.with_text(dataclasses.replace(clip, logvar=logvar))

    def request(self, row: int, epoch: int) -> DecodeRequest:
        """The request to the decoder for a trained row in an epoch."""
        manifest, bucket = self.manifest, self.tape.bucket_of(row)
        times, _, box = self._cut(row, epoch)
        path = manifest.path(row)
        return DecodeRequest(
            row=row,
            key=str(manifest.key[row]),
            path=path,
            offset=int(manifest.offset[row]),
            length=int(manifest.length[row]),
            kind=str(manifest.kind[row]),
            times=times,
            crop=box,
            shown=(int(manifest.height[row]), int(manifest.width[row])),
            height=bucket.height,
            width=bucket.width,
            start=float(manifest.start[row]),
            fps=float(manifest.fps[row]),
            traits=str(manifest.traits[row]),
            alpha_background=self._cfg.alpha_background,
            backend=self._fastest(row, times),
            reading=self._reading if is_remote(path) else None,
            digest=str(manifest.sample_digest[row]),
            stamp=manifest.shards.get(str(manifest.shard[row])) if is_remote(path) else None,
        )

    def _backend_of(self, row: int) -> str:
        """The decoder whose pixels a row has: PyAV where others would give other pixels or times."""
        return "pyav" if self.manifest.traits[row] else self._backend

    def _fastest(self, row: int, times: Sequence[float]) -> str:
        """The decoder that reads a row: with `auto` the fastest, by what the index measured, that is installed."""
        if not self._others or not self.manifest.decoders or self.manifest.traits[row]:
            return self._backend_of(row)
        known = self.manifest.decoders.get(decoders.kind_of(self.manifest, row), {})
        pattern = decoders.pattern_of(times, float(self.manifest.fps[row]))
        chosen = decoders.fastest(known.get(pattern, {}))
        return chosen if chosen in self._others else "pyav"

    @property
    def program(self) -> str:
        """The decoder whose program serves all of a run's: torchcodec's where a clip may be read by it."""
        chosen = {
            decoders.fastest(times)
            for patterns in self.manifest.decoders.values()
            for times in patterns.values()
        }
        is_used = "torchcodec" in self._others and "torchcodec" in chosen
        return "torchcodec" if is_used else self._backend

    def _treated(self, row: int) -> str:
        """What was done about the traits of a row, for the name of its latents."""
        traits = str(self.manifest.traits[row])
        return f"{traits} over {self._cfg.alpha_background}" if ALPHA in traits.split() else traits

    def _decode(self, row: int, epoch: int) -> Future:
        """A future of the sample's Clip or Failure."""
        request = self.request(row, epoch)

        def as_clip(pixels: np.ndarray | Failure) -> Clip | Failure | Future:
            if isinstance(pixels, Failure):
                return pixels
            clip = self._clip(row, epoch, pixels, None)
            if self._texts is None and self._stored_text(clip) is None:
                return clip
            # The thread of the decoder must not wait for an embedding.
            return self._readers.submit(self.with_text, clip)

        # In the pool, not in a second future: the two would hold each other, and the clip with them.
        own = self._backend_of(row)
        if request.backend == own:
            return self._pool.submit(request, convert=as_clip)

        def or_by_own(pixels: np.ndarray | Failure) -> Clip | Failure | Future:
            # A clip is lost where its own decoder cannot read it, whatever is the fastest for its kind.
            if isinstance(pixels, Failure):
                again = dataclasses.replace(request, backend=own)
                return self._pool.submit(again, convert=as_clip)
            return as_clip(pixels)

        return self._pool.submit(request, convert=or_by_own)

    def _clip(
        self,
        row: int,
        epoch: int,
        pixels: np.ndarray | None,
        latents: np.ndarray | None,
        fps: float | None = None,
    ) -> Clip:
        """`fps` is the rate of latents in a shard; that of others follows from their times."""
        fps = self._cut(row, epoch)[1] if fps is None else fps
        digest = self.manifest.sample_digest[row]
        return Clip(row, epoch, pixels, latents, fps, self.caption(row, epoch), digest)

    def caption(self, row: int, epoch: int) -> str:
        """The caption of a row in its own epoch."""
        manifest = self.manifest
        return self._captions.prompt(manifest.caption[row], manifest.captions[row], epoch, row)

    def _wait(self, row: int, future: Future) -> Clip | Failure:
        """A future's value. The pool's deadlines bound the wait. Raises Fault where the pool has ended."""
        while True:
            try:
                result = future.result(timeout=_POLL_SECONDS)
            except TimeoutError:
                if not self._pool.alive:
                    raise Fault(
                        f"the decode pool ended while the clip of row {row} was awaited"
                    ) from None
                continue
            except CancelledError:
                raise Fault(
                    f"the loader was closed while the clip of row {row} was awaited"
                ) from None
            if not isinstance(result, Future):
                return result
            future = result

    def record(self, step: int, failure: Failure, *, on_disk: bool = True) -> None:
        """Exclude a clip from `step` on. Raises Fault where too many are lost."""
        self.quarantine.add(
            step,
            failure,
            on_disk=on_disk,
            shard=str(self.manifest.shard[failure.row]),
            key=str(self.manifest.key[failure.row]),
            backend=self._backend_of(failure.row),
        )

    def close(self) -> None:
        """End the decode processes; nothing more can be read."""
        self._pool.close()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pixel_bytes(bucket: Bucket) -> int:
    return 3 * bucket.frames * bucket.height * bucket.width


def backend_of(cfg: DataConfig) -> str:
    """The decoder that a config names."""
    return "pyav" if cfg.decoder == "auto" else cfg.decoder


def _backend(cfg: DataConfig, manifest: Manifest, tape: TapeLike) -> str:
    """The decoder that a config names. Raises UserError where it is missing or cannot read the clips."""
    backend = backend_of(cfg)
    if backend == "torchcodec":
        decode_torchcodec.require()
    elif backend == "decord":
        decode_decord.require()
        rows = tape.rows[manifest.traits[tape.rows] == ""]
        codecs = manifest.codec[rows]
        for codec in decode_decord.UNREADABLE_CODECS & set(codecs.tolist()):
            key = manifest.key[rows[codecs == codec][0]]
            raise UserError(
                f"data.decoder=decord cannot read {codec}, the codec of {key!r}; set data.decoder=auto"
            )
    return backend
