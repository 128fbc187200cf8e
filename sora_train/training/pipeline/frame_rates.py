"""The frame rates at which clips are trained: a slow clip keeps its own, and that is what a model is told and samples
should have."""

import numpy as np

from sora_train.config import Config
from sora_train.data.latents.members import KIND as LATENTS
from sora_train.data.sample import Bucket
from sora_train.training.pipeline.data import TrainingData

DIGITS = 3
"""Of a rate, by which equal ones are counted."""


def trained_rates(cfg: Config, data: TrainingData, bucket: Bucket | None = None) -> np.ndarray:
    """Frames a second, (N,) float64, of every clip of several frames that has a bucket, or that `bucket`."""
    manifest, placed = data.manifest, data.assignment.bucket_of_row
    wanted = [
        number
        for number, spec in enumerate(data.table)
        if spec.bucket.frames > 1 and bucket in (None, spec.bucket)
    ]
    stored = manifest.kind == LATENTS
    rates = np.where(stored, manifest.fps, np.minimum(manifest.fps, cfg.buckets.fps))
    return np.round(rates[np.isin(placed, wanted) & (rates > 0)], DIGITS)


def usual_rate(cfg: Config, data: TrainingData, bucket: Bucket) -> float:
    """The rate of most clips of a bucket, the highest among equals; `buckets.fps` for images, which only play at it."""
    rates, counts = np.unique(trained_rates(cfg, data, bucket), return_counts=True)
    if not len(rates):
        return cfg.buckets.fps
    return float(rates[counts == counts.max()].max())


def rate_range(cfg: Config, data: TrainingData) -> list[float]:
    """The lowest and the highest rate trained; [] where there are images alone."""
    rates = trained_rates(cfg, data)
    return [float(rates.min()), float(rates.max())] if len(rates) else []
