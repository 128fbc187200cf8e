"""Stored latents and caption embeddings under keys that name everything they were made from.

Each entry is written under a temporary name and renamed, so any number of processes may share a folder.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from pathlib import Path

import numpy as np

from sora_train.base.files import renamed_when_whole
from sora_train.data.latents.members import TEXT, DamagedMember, pack_text, unpack
from sora_train.data.manifest import text_digest
from sora_train.data.sample import Bucket
from sora_train.data.transforms import TRANSFORM_VERSION

VERSION = 2
TEXT_FOLDER = "text"
_FOLDERS = 256


def latent_key(
    digest: str,
    bucket: Bucket,
    times: tuple[float, ...],
    crop: tuple[float, ...],
    vae_digest: str,
    *,
    dtype: str = "float32",
    decoder: str = "",
    treated: str = "",
    transform: int = TRANSFORM_VERSION,
    version: int = VERSION,
) -> str:
    """Content address of a clip's latents: sample bytes, times, crop, bucket, the VAE and its precision,
    decoder and transform, and what was done about the clip's traits."""
    parts = (
        version,
        digest,
        bucket.name,
        [f"{t:.6f}" for t in times],
        [f"{c:.3f}" for c in crop],
        vae_digest,
        dtype,
        decoder,
        transform,
        *([treated] if treated else ()),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


class LatentCache:
    """A folder of .npy files two levels deep: `KEY.npy` the latents, `KEY.logvar.npy` their log-variance.

    So latents stored for `data.latents=sample` serve `mode` as well.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.unreadable = 0
        self._lock = threading.Lock()

    def path(self, key: str, logvar: bool = False) -> Path:
        name = f"{key}.logvar.npy" if logvar else f"{key}.npy"
        return self.folder / key[:2] / key[2:4] / name

    def has(self, key: str, logvar: bool = False) -> bool:
        """Whether latents are stored, and with `logvar` their log-variance."""
        return self.path(key).exists() and (not logvar or self.path(key, True).exists())

    def __contains__(self, key: str) -> bool:
        return self.has(key)

    def size(self, key: str, logvar: bool = False) -> int | None:
        """Bytes of the stored files, None where they do not exist."""
        try:
            size = self.path(key).stat().st_size
            return size + self.path(key, True).stat().st_size if logvar else size
        except FileNotFoundError:
            return None

    def get(self, key: str, logvar: bool = False) -> np.ndarray | None:
        """The stored array, or None. A damaged file is removed, counted in `unreadable`, and a miss."""
        path = self.path(key, logvar)
        try:
            return np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError):
            with self._lock:
                self.unreadable += 1
            path.unlink(missing_ok=True)
            return None

    def put(self, key: str, latents: np.ndarray, logvar: np.ndarray | None = None) -> None:
        """Store latents and their log-variance."""
        # The latents come last: where they are, their log-variance is too.
        for array, path in ((logvar, self.path(key, True)), (latents, self.path(key))):
            if array is not None:
                with renamed_when_whole(path) as partial, partial.open("wb") as file:
                    np.save(file, array, allow_pickle=False)


class TextCache:
    """The embeddings of captions by one frozen text encoder, in the folder of the latents.

    `max_bytes` bounds the folder. Names are hashes, so each of its 256 folders gets an equal share, which
    is counted when this process first writes there. An embedding without room is not stored.
    """

    def __init__(self, folder: Path | str, encoder_digest: str, max_bytes: float = float("inf")):
        self.folder = Path(folder) / TEXT_FOLDER
        self.encoder_digest = encoder_digest
        self._share = max_bytes / _FOLDERS
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    def path(self, caption: str) -> Path:
        # The encoder's digest names its padding and its longest caption too.
        parts = (VERSION, self.encoder_digest, text_digest(caption))
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, caption: str) -> bool:
        return self.path(caption).exists()

    def get(self, caption: str) -> np.ndarray | None:
        """The stored embedding (L, D), float32, or None. A damaged file is removed, and a miss."""
        path = self.path(caption)
        try:
            return unpack(path.read_bytes(), TEXT)
        except FileNotFoundError:
            return None
        except DamagedMember:
            path.unlink(missing_ok=True)
            return None

    def put(self, caption: str, embedding: np.ndarray, dtype: str = "float32") -> bool:
        """Store an embedding (L, D); False where there is no room."""
        data = pack_text(
            embedding, encoder_digest=self.encoder_digest, caption=caption, dtype=dtype
        )
        path = self.path(caption)
        if not self._has_room(path.parent, len(data)):
            return False
        with renamed_when_whole(path) as partial:
            partial.write_bytes(data)
        return True

    def _has_room(self, folder: Path, size: int) -> bool:
        if self._share == float("inf"):
            return True
        with self._lock:
            if folder.name not in self._held:
                files = list(os.scandir(folder)) if folder.is_dir() else []
                self._held[folder.name] = sum(file.stat().st_size for file in files)
            if self._held[folder.name] + size > self._share:
                return False
            self._held[folder.name] += size
        return True
