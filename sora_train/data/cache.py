"""Stored latents, found by what they were made from: the same clip, cut and VAE give the same key."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import numpy as np

from sora_train.data.sample import Bucket

VERSION = 1


def latent_key(
    digest: str,
    bucket: Bucket,
    times: tuple[float, ...],
    crop: tuple[float, ...],
    vae_digest: str,
    version: int = VERSION,
) -> str:
    """Content address of a clip's latents: sample bytes, moments, crop, size and VAE."""
    parts = (
        version,
        digest,
        bucket.name,
        [f"{t:.6f}" for t in times],
        [f"{c:.3f}" for c in crop],
        vae_digest,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


class LatentCache:
    """A folder of .npy files two levels deep; any number of processes may share it."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.unreadable = 0
        self._lock = threading.Lock()

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:4] / f"{key}.npy"

    def __contains__(self, key: str) -> bool:
        return self.path(key).exists()

    def size(self, key: str) -> int | None:
        """Bytes of what is stored, None where nothing is."""
        try:
            return self.path(key).stat().st_size
        except FileNotFoundError:
            return None

    def get(self, key: str) -> np.ndarray | None:
        """The stored array, or None. A damaged file is removed, counted in `unreadable`, and a miss."""
        path = self.path(key)
        try:
            return np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError):
            with self._lock:
                self.unreadable += 1
            path.unlink(missing_ok=True)
            return None

    def put(self, key: str, latents: np.ndarray) -> None:
        """Store an array under a temporary name, then rename."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            with partial.open("wb") as file:
                np.save(file, latents, allow_pickle=False)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
