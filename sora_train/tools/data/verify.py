"""Encodes a keyed random sample of clips and captions again, and compares with what is stored: `sora data verify`.

A run's own config says which clips, how they are cut and by which networks; what is compared is that
run's cache, or shards that `sora data encode` made of the same source.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sora_train.config import Config
from sora_train.config.sections.settings import VerifySettings
from sora_train.data.index.sources import Sources, open_sources
from sora_train.data.latents.cache import LatentCache, TextCache
from sora_train.data.latents.members import LATENTS, TEXT, DamagedMember, read_member, stored_of
from sora_train.data.latents.provenance import Made, differences, read_made_with, require_same
from sora_train.data.loader import Loader
from sora_train.data.manifest import FILE_NAME, Manifest
from sora_train.data.sample import Clip
from sora_train.data.storage.retry import ReadPolicy
from sora_train.data.transforms import uniform
from sora_train.errors import UserError
from sora_train.models.text.encoder import TextEncoder
from sora_train.models.text.published import build_text_encoder
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.runtime.world import pick_device
from sora_train.tools.terminal import table_of
from sora_train.training.pipeline.encoding import CacheFiller
from sora_train.training.pipeline.plan import (
    bucket_table,
    cost_model,
    made_with,
    plan,
    token_counter,
)

CLIPS_AT_ONCE = 8
TOLERANCE = {"float32": 1e-3, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest difference by the least precise type involved, in units of the value or of 1, whichever is larger. Other
kernels and batch sizes round differently; another crop or another network is off by tenths."""

COLUMNS = ("what", "compared", "largest difference", "tolerance", "differ")

Arrays = dict[str, np.ndarray]
"""`mean` and `logvar` of latents, `embedding` of the caption."""


@dataclass(frozen=True)
class Comparison:
    """What came of one comparison; `difference` is in units of `tolerance`'s."""

    what: str
    name: str
    difference: float
    tolerance: float
    detail: str = ""

    @property
    def same(self) -> bool:
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """All comparisons, and a table of how the stored folder's settings differ from these ('' where they do not)."""

    comparisons: list[Comparison]
    other_settings: str
    stored: int
    """Clips whose latents are stored."""

    @property
    def wrong(self) -> list[Comparison]:
        return [one for one in self.comparisons if not one.same]

    def __str__(self) -> str:
        lines = []
        if self.other_settings:
            lines.append(f"other settings there than now:\n{self.other_settings}")
        rows = []
        for what in sorted({one.what for one in self.comparisons}):
            compared = [one for one in self.comparisons if one.what == what]
            largest = max(compared, key=lambda one: one.difference)
            wrong = sum(not one.same for one in compared)
            numbers = f"{largest.difference:.2e}", f"{largest.tolerance:.0e}"
            rows.append((what, str(len(compared)), *numbers, str(wrong)))
        lines.append(table_of(COLUMNS, rows))
        clips = len({one.name for one in self.comparisons})
        lines.append(f"{clips} of {self.stored} stored clips were encoded again")
        lines += [
            f"  {one.name}: {one.what} differs by {one.difference:.2e}{one.detail and f' ({one.detail})'}"
            for one in self.wrong
        ]
        return "\n".join(lines)


def verify(cfg: Config, settings: VerifySettings) -> Verification:
    """Compare what is stored with what is encoded now.

    Raises:
        UserError: nothing is stored, or the folder named belongs to other settings or another source.
    """
    encoded = settings.folder
    if encoded and not any((encoded / name / FILE_NAME).is_file() for name in ("train", "val")):
        raise UserError(
            f"encoded={encoded} holds neither train/{FILE_NAME} nor val/{FILE_NAME}; give the output= of "
            "`sora data encode`"
        )
    if cfg.task != "text_to_video":
        raise UserError(
            f"task={cfg.task} trains on pixels and stores nothing; name a run of text_to_video"
        )
    data = cfg.data.model_copy(
        update={"stored_latents": "ignore", "stored_text": "ignore", "max_drop_fraction": 1.0}
    )
    cfg = cfg.model_copy(update={"data": data})
    sources = open_sources(cfg, Path(cfg.run.dir))
    device = pick_device(cfg.run.device)
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    vae = VideoVAE.from_config(cfg.vae).to(device)
    text: TextEncoder | None = None
    if not cfg.text.trainable:
        text = build_text_encoder(cfg.text)
        text.init_weights(cfg.seed)
        text.to(device)
    made = made_with(cfg, vae.digest(), text.digest() if text else "")
    with ExitStack() as stack:
        places: list[_Place] = []
        folder = Path(cfg.data.cache_dir or Path(cfg.run.dir) / "cache").expanduser()
        if encoded is None:
            require_same(folder, made, "data.cache_dir")
            places.append(_Cache(cfg, sources.train, vae, made, folder))
        else:
            for name, manifest in (("train", sources.train), ("val", sources.val)):
                if (encoded / name / FILE_NAME).is_file():
                    places.append(_Shards(cfg, manifest, vae, made, encoded / name))
        for place in places:
            stack.callback(place.loader.close)
        stored = sum(len(place.rows()) for place in places)
        if not stored:
            raise UserError(
                f"{encoded or folder} holds none of this run's latents; name the run.dir or data.cache_dir "
                "that was trained with, or encoded=DIR"
            )
        comparisons = [one for place in places for one in place.compared(settings, text, device)]
        tables = dict.fromkeys(differences(place.made_there, made) for place in places)
    return Verification(comparisons, "\n".join(filter(None, tables)), stored)


class _Place:
    """A place where latents are stored, with a loader of the clips that they were made of."""

    def __init__(
        self, cfg: Config, manifest: Manifest, vae: VideoVAE, made: Made, cache: LatentCache | None
    ):
        self.cfg, self.manifest, self.vae, self.made = cfg, manifest, vae, made
        patch = cfg.model.patch_size
        table = bucket_table(cfg, vae, patch)
        _, tape, assignment = plan(
            cfg, Sources.of(manifest), table, token_counter(vae, patch), cost_model(cfg)
        )
        self.loader = Loader(
            manifest,
            tape,
            cfg.buckets,
            cfg.data,
            seed=cfg.seed,
            micro_batches=1,
            vae_digest=made["latents"]["VAE"],
            vae_dtype=cfg.vae.dtype,
            cache=cache,
            reasons=assignment.reasons,
        )

    made_there: Made

    def rows(self) -> list[int]:
        """Rows whose latents are stored."""
        raise NotImplementedError

    def chosen(self, settings: VerifySettings) -> list[int]:
        """The rows to look at: those of the lowest keyed draws, so that a larger sample holds a smaller one."""
        rows = self.rows()
        drawn = sorted(rows, key=lambda row: uniform(self.cfg.seed, "verify", row))
        return sorted(drawn[: settings.count_of(len(rows))])

    def stored(self, clip: Clip) -> tuple[Arrays, str]:
        """What is stored for a clip, and the type it is stored in. Raises DamagedMember."""
        raise NotImplementedError

    def compared(
        self, settings: VerifySettings, text: TextEncoder | None, device: torch.device
    ) -> Iterator[Comparison]:
        """Every chosen clip, encoded again by itself."""
        rows = self.chosen(settings)
        filler = CacheFiller(self.loader, self.vae, device)
        for start in range(0, len(rows), CLIPS_AT_ONCE):
            clips, failures = self.loader.decode_rows(rows[start : start + CLIPS_AT_ONCE])
            for failure in failures:
                name = str(self.manifest.key[failure.row])
                yield Comparison("clip", name, math.inf, 0.0, f"{failure.reason}: {failure.detail}")
            for clip in clips:
                yield from self._compare(clip, filler, text)

    def _compare(
        self, clip: Clip, filler: CacheFiller, text: TextEncoder | None
    ) -> Iterator[Comparison]:
        name = str(self.manifest.key[clip.row])
        try:
            stored, dtype = self.stored(clip)
        except DamagedMember as error:
            yield Comparison("clip", name, math.inf, 0.0, str(error))
            return
        (encoded,) = filler.encode([clip])
        assert encoded.latents is not None
        now = {"mean": encoded.latents}
        if encoded.logvar is not None:
            now["logvar"] = encoded.logvar
        if text is not None and "embedding" in stored:
            now["embedding"] = text.embedding(clip.caption).float().cpu().numpy()
        types = (dtype, self.cfg.vae.dtype)
        for what in stored.keys() & now.keys():
            difference = _difference(stored[what], now[what])
            tolerance = max(TOLERANCE[kind] for kind in types)
            yield Comparison(what, name, difference, tolerance)


class _Cache(_Place):
    """A run's cache."""

    def __init__(self, cfg: Config, manifest: Manifest, vae: VideoVAE, made: Made, folder: Path):
        self.entries = LatentCache(folder)
        super().__init__(cfg, manifest, vae, made, self.entries)
        self.made_there = read_made_with(folder)
        digest = made.get("text", {}).get("text encoder", "")
        self.texts = TextCache(folder, digest) if digest else None

    def rows(self) -> list[int]:
        return [row for row in self.loader.tape.rows.tolist() if self.loader.is_cached(row)]

    def stored(self, clip: Clip) -> tuple[Arrays, str]:
        key = self.loader.latent_key(clip.row)
        arrays = {"mean": self.entries.get(key)}
        if self.loader.drawn:
            arrays["logvar"] = self.entries.get(key, True)
        if any(array is None for array in arrays.values()):
            raise DamagedMember(f"{self.entries.path(key)} was damaged and is removed")
        if self.texts is not None:
            arrays["embedding"] = self.texts.get(clip.caption)
        return {name: array for name, array in arrays.items() if array is not None}, "float32"


class _Shards(_Place):
    """A split of encoded shards, whose rows are those of their source."""

    def __init__(self, cfg: Config, manifest: Manifest, vae: VideoVAE, made: Made, folder: Path):
        self.shards = Manifest.load(folder / FILE_NAME)
        if len(self.shards) != len(manifest) or (self.shards.caption != manifest.caption).any():
            raise UserError(
                f"encoded={folder.parent}: {folder.name} holds {len(self.shards)} clips, this run's source "
                f"{len(manifest)}, or other captions; give the source and the seed that they were encoded with"
            )
        self.made_there = read_made_with(folder)
        self.dtype = self.made_there.get("encode", {}).get("dtype", "bfloat16")
        super().__init__(cfg, manifest, vae, made, None)

    def rows(self) -> list[int]:
        members = self.shards.members
        return [row for row in self.loader.tape.rows.tolist() if members[row]]

    def stored(self, clip: Clip) -> tuple[Arrays, str]:
        row, policy = clip.row, ReadPolicy(self.cfg.data.read_retries, self.cfg.data.read_timeout)
        path = self.shards.path(row)
        latents, text = stored_of(self.shards.members[row])
        arrays: Arrays = {}
        if latents is not None:
            arrays["mean"], logvar = read_member(path, latents, LATENTS, policy)
            if logvar is not None:
                arrays["logvar"] = logvar
        if text is not None:
            arrays["embedding"], _ = read_member(path, text, TEXT, policy)
        return arrays, self.dtype


def _difference(stored: np.ndarray, now: np.ndarray) -> float:
    """The largest difference, large values counting by their share; infinite for another shape."""
    if stored.shape != now.shape:
        return math.inf
    return float(np.max(np.abs(stored - now) / np.maximum(1.0, np.abs(now))))
