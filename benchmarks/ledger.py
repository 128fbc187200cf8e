"""How many wrong captions the clip ledger finds: some of the shapes world's are exchanged, and its list is counted."""

from pathlib import Path

import numpy as np

from sora_train.data.index.shapes_source import prepare_shapes
from sora_train.data.manifest import FILE_NAME, Manifest, text_digest


def plant(folder: Path, clips: int, share: float, seed: int = 0) -> tuple[Path, set[str]]:
    """A manifest below `folder` of the shapes world's training clips, and the keys of those with a wrong caption.

    The share of the videos that is drawn gives each its caption to the next one drawn, as a shifted line of a caption
    file would; none keeps its own.
    """
    manifest = prepare_shapes(folder, split="train", num_clips=clips, seed=seed)
    rng = np.random.default_rng([seed, 5])
    videos = np.flatnonzero(manifest.kind == "video")
    chosen = rng.permutation(videos)[: round(share * len(manifest))]
    caption = manifest.caption.copy()
    caption[chosen] = manifest.caption[np.roll(chosen, 1)]
    wrong = np.flatnonzero(caption != manifest.caption)
    digest = np.array([text_digest(text) for text in caption.tolist()], object)
    planted = folder / "planted" / FILE_NAME
    planted.parent.mkdir(parents=True, exist_ok=True)
    manifest.with_columns(caption=caption, caption_digest=digest).save(planted)
    return planted, set(manifest.key[wrong].tolist())


def originals(folder: Path, clips: int, seed: int = 0) -> Manifest:
    """The same clips with the captions that they were rendered with."""
    return prepare_shapes(folder, split="train", num_clips=clips, seed=seed)
