"""Plain webdataset on the same clips: `WebDataset(...).decode()` in torch's DataLoader, nothing of our loader.

It decodes with our decoder's own function, the same frames at the same size, so that what differs is
the way of the clips to the consumer.
"""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sora_train.data.decode.frames import BadClip, DecodeRequest, decode_frames
from sora_train.data.index.kinds import media_kind
from sora_train.data.manifest import Manifest
from sora_train.data.storage.remote import is_remote


@dataclass(frozen=True)
class DecodeSample:
    """A map stage: a webdataset sample becomes the frames that are asked of it, else None."""

    requests: Mapping[str, DecodeRequest]

    def __call__(self, sample: dict[str, Any]) -> np.ndarray | None:
        request = self.requests.get(sample["__key__"])
        member = next((name for name in sample if media_kind(f"x.{name}")), None)
        if request is None or member is None:
            return None
        try:
            return decode_frames(replace(request, data=sample[member], offset=0))
        except BadClip:
            return None


def missing(manifest: Manifest) -> str:
    """Why webdataset cannot read the source; empty where it can."""
    shards = _shards(manifest)
    if not shards or not all(shard.endswith(".tar") for shard in shards):
        return "the clips do not lie in tars (`sora prep shards` writes them)"
    if any(is_remote(shard) for shard in shards):
        return "the shards are not on this machine"
    import webdataset

    first = next(iter(webdataset.WebDataset(shards[:1], shardshuffle=False)), None)
    if first is None or first["__key__"] not in set(manifest.key.tolist()):
        return "webdataset names the samples otherwise than the manifest does"
    return ""


def rate(
    manifest: Manifest,
    requests: Mapping[str, DecodeRequest],
    *,
    clips: int,
    seconds: float,
    workers: int,
) -> float:
    """Clips a second over `clips` clips or `seconds`, after every process has delivered some.

    Where there are fewer shards than `workers`, only as many processes work: webdataset deals out
    whole shards.
    """
    import torch
    import webdataset

    shards = _shards(manifest)
    workers = min(workers, len(shards))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=False)
        # Images stay bytes, as videos do: both are decoded by the map.
        .decode()
        .map(DecodeSample(requests))
        .select(lambda frames: frames is not None)
        .repeat()
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers)
    delivered = iter(loader)
    for _ in itertools.islice(delivered, 4 * workers):
        pass
    began = time.perf_counter()
    count, spent = 0, 0.0
    while count < clips and spent < seconds:
        next(delivered)
        count, spent = count + 1, time.perf_counter() - began
    return count / spent


def _shards(manifest: Manifest) -> list[str]:
    rows = [np.flatnonzero(manifest.shard == name)[0] for name in np.unique(manifest.shard) if name]
    return [manifest.path(int(row)) for row in rows]
