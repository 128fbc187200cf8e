"""The shapes world as a source like any other: rendered, encoded, and written by `ShardWriter`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from sora_train.data.decode.pool import DecodePool
from sora_train.data.index.shapes_encode import ShapesRequest
from sora_train.data.index.shard_writer import ShardWriter
from sora_train.data.manifest import FILE_NAME, Manifest
from sora_train.data.sample import Failure
from sora_train.data.shapes.world import IMAGE_SHARE, SPLITS, Lasting
from sora_train.errors import Fault, UserError

# Raised when equal arguments no longer give equal files.
VERSION = 6
_SCENES_A_REQUEST = 20
_REQUEST_SECONDS = 300.0
_SHARD_BYTES = 2 << 20


def prepare_shapes(
    dir: Path | str,
    *,
    split: str,
    num_clips: int,
    seed: int,
    image_share: float = IMAGE_SHARE,
    colour: str = "",
    lasting: Lasting | None = None,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Scenes 0 to `num_clips` - 1 of a split as shards in a folder below `dir`; made once, then reused.

    The folder is named by what is in it and appears whole. `progress(done, total)` is called as
    scenes are written. Raises UserError on an unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r} is none of the shapes world's: {', '.join(SPLITS)}")
    kind = "-".join(filter(None, (split, colour, lasting.name if lasting else "")))
    name = f"{kind}-{num_clips}-seed{seed}-images{image_share:g}-v{VERSION}"
    folder = Path(dir) / name
    if (folder / FILE_NAME).exists():
        return Manifest.load(folder / FILE_NAME, root=folder)
    partial = folder.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        _write(partial, split, num_clips, seed, image_share, colour, lasting, workers, progress)
        try:
            os.rename(partial, folder)
        except OSError:
            # Another process made the same folder meanwhile, or an older attempt left it without a manifest.
            if not (folder / FILE_NAME).exists():
                shutil.rmtree(folder)
                os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Manifest.load(folder / FILE_NAME, root=folder)


def _write(
    folder: Path,
    split: str,
    num_clips: int,
    seed: int,
    image_share: float,
    colour: str,
    lasting: Lasting | None,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    with (
        DecodePool(workers, _REQUEST_SECONDS, module="sora_train.data.index.shapes_worker") as pool,
        ShardWriter(folder, _SHARD_BYTES, prefix="shapes", source=f"shapes/{split}") as writer,
    ):
        futures = [
            pool.submit(
                ShapesRequest(
                    first,
                    f"{split}-{first}",
                    seed,
                    split,
                    first,
                    min(_SCENES_A_REQUEST, num_clips - first),
                    image_share,
                    colour,
                    lasting,
                )
            )
            for first in range(0, num_clips, _SCENES_A_REQUEST)
        ]
        done = 0
        for future in futures:
            scenes = future.result()
            if isinstance(scenes, Failure):
                raise Fault(f"rendering the shapes world failed: {scenes.detail}")
            for scene in scenes:
                writer.write(scene.key, scene.data, scene.extension, scene.caption, scene.meta)
            done += len(scenes)
            if progress:
                progress(done, num_clips)
