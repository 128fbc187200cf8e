"""The contract between data and training: buckets, entries of the tape, clips and failures."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, order=True)
class Bucket:
    """One shape of clip: every clip of a micro-batch is brought to it."""

    frames: int
    height: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class MicroBatch:
    """One entry of the tape: manifest rows of one bucket that are trained together.

    `epoch` is the tape's. `epochs` holds each row's own, by which its draws are keyed: how often it
    was trained before. They differ where a source is repeated within an epoch of the tape.
    """

    index: int
    bucket: Bucket
    epoch: int
    rows: tuple[int, ...]
    epochs: tuple[int, ...]


@dataclass(frozen=True)
class Clip:
    """A sample as it reaches training: its pixels, or its stored latents instead.

    `pixels` is uint8 (T, H, W, 3) RGB, `latents` float32 (C, T', H', W'), `fps` the frame rate after
    sampling (0 for a single frame, which has none), `digest` that of the sample's bytes, `text` the
    caption's stored embedding, float32 (L, D), where there is one. `logvar` is the log-variance of
    stored latents, of their shape, where they are to be drawn from and not taken as they are.
    """

    row: int
    epoch: int
    pixels: np.ndarray | None
    latents: np.ndarray | None
    fps: float
    caption: str
    digest: str
    text: np.ndarray | None = None
    logvar: np.ndarray | None = None


@dataclass(frozen=True)
class Failure:
    """A sample that could not be delivered, and why."""

    row: int
    reason: str
    detail: str


@dataclass(frozen=True)
class ClipBatch:
    """A micro-batch read from storage.

    `weight` counts the good clips. It is 0 where every clip failed, and in a slot left over
    because the ranks do not divide the step; there `micro_batch.rows` is empty and its bucket
    says which shape the idle forward pass takes.
    """

    micro_batch: MicroBatch
    clips: list[Clip]
    failures: list[Failure]
    weight: float


def rows_of(batches: list[ClipBatch]) -> list[int]:
    """The rows of the manifest in micro-batches."""
    return [row for batch in batches for row in batch.micro_batch.rows]
