"""What the clip ledger measures: each clip's loss at fixed noise levels, with its own caption, with others', with none.

A clip meets the same noise at every checkpoint and with every caption, so that losses differ by weights and caption
alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from sora_train.base.seeding import key_seed
from sora_train.data.loader import Loader
from sora_train.data.sample import Clip
from sora_train.objectives import TextToVideoObjective
from sora_train.objectives.validation import same_shape_batches

EXCHANGED = 2
"""Other clips' captions that each clip is shown with."""
NOT_MEASURED = np.nan


@dataclass(frozen=True)
class Losses:
    """Losses of N clips at L noise levels: `own` (N, L), `exchanged` (N, L, EXCHANGED), `empty` (N, L), float64.

    `rows` (N,) are the clips' numbers in the manifest, `shapes` (N,) words for their shape. What was not measured, or
    was no other caption, is NaN.
    """

    rows: np.ndarray
    shapes: np.ndarray
    own: np.ndarray
    exchanged: np.ndarray
    empty: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence["Losses"]) -> "Losses":
        names = ("rows", "shapes", "own", "exchanged", "empty")
        whole = cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
        return whole.at(np.argsort(whole.rows, kind="stable"))

    def at(self, places: np.ndarray) -> "Losses":
        """The clips at these places, in their order."""
        return Losses(
            self.rows[places],
            self.shapes[places],
            self.own[places],
            self.exchanged[places],
            self.empty[places],
        )


class Measuring:
    """The losses of a run's clips under one model after the other."""

    def __init__(self, objective: TextToVideoObjective, kind: str, times: Sequence[float]):
        self.objective, self.kind, self.times = objective, kind, tuple(times)

    @torch.no_grad()
    def batch(self, model: nn.Module, clips: list[Clip], others: list[list[Clip]]) -> Losses:
        """Losses of clips of one shape; `others` are the same clips with other captions, EXCHANGED lists and one with
        empty captions, or none at all."""
        clips = self._encoded(clips)
        of_captions = [self._losses(model, clips)]
        for told in others:
            pairs = zip(clips, told, strict=True)
            of_captions.append(
                self._losses(model, [replace(c, caption=o.caption, text=o.text) for c, o in pairs])
            )
        own, *rest = of_captions
        unknown = np.full_like(own, NOT_MEASURED)
        empty = rest.pop() if rest else unknown
        exchanged = np.stack(rest or [unknown] * EXCHANGED, axis=2)
        for number, told in enumerate(others[:-1]):
            same = [c.caption == o.caption for c, o in zip(clips, told, strict=True)]
            exchanged[same, :, number] = NOT_MEASURED
        rows = np.array([clip.row for clip in clips])
        return Losses(rows, np.full(len(clips), _shape(clips[0]), object), own, exchanged, empty)

    def _losses(self, model: nn.Module, clips: list[Clip]) -> np.ndarray:
        """Own losses (clips, levels)."""
        losses = self.objective.clip_losses(model, clips, self.kind, self.times)
        return torch.stack(losses, dim=1).double().cpu().numpy()

    def _encoded(self, clips: list[Clip]) -> list[Clip]:
        """The clips with latents, so that they are encoded once for all captions."""
        if self.kind != "t2v":
            return clips
        latents = self.objective.latents(clips, [self.kind] * len(clips)).cpu().numpy()
        return [replace(clip, latents=one) for clip, one in zip(clips, latents, strict=True)]


def batches(loader: Loader, rows: Sequence[int], size: int) -> Iterator[tuple[list[Clip], int]]:
    """Batches of clips of one shape, as training reads them in epoch 0, and how many rows are done after each."""
    done = 0
    for bucket in sorted({loader.tape.bucket_of(row) for row in rows}):
        own = [row for row in rows if loader.tape.bucket_of(row) == bucket]
        for start in range(0, len(own), size):
            part = own[start : start + size]
            clips, _ = loader.read_rows(part)
            done += len(part)
            for alike in same_shape_batches(clips):
                yield alike, done


def captions_for(loader: Loader, rows: Sequence[int], seed: int) -> dict[int, list[str]]:
    """EXCHANGED captions for each row: those of other clips of its bucket with other words, or of any clip where there
    are too few, drawn by a key of (seed, row)."""
    words = np.array([loader.caption(row, 0) for row in rows], object)
    buckets = loader.tape.bucket_of_row[list(rows)]
    known = {bucket: np.unique(words[buckets == bucket]) for bucket in np.unique(buckets).tolist()}
    all_words = np.unique(words)
    drawn = {}
    for row, own, bucket in zip(rows, words, buckets.tolist(), strict=True):
        rng = np.random.Generator(np.random.Philox(key_seed(seed, "ledger", row)))
        choice = known[bucket] if len(known[bucket]) > EXCHANGED else all_words
        choice = choice[choice != own]
        # A single caption for all clips has no other; that is found by its losses being unknown.
        choice = choice if len(choice) else all_words
        drawn[row] = rng.choice(choice, EXCHANGED, replace=len(choice) < EXCHANGED).tolist()
    return drawn


def _shape(clip: Clip) -> str:
    array = clip.latents if clip.latents is not None else clip.pixels
    assert array is not None
    return "x".join(map(str, array.shape))
