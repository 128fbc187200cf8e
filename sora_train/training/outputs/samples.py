"""Samples that a run makes of itself: of which prompts, in which shape, and where they go."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from sora_train.config import Config
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.sampling.files import save_clips
from sora_train.sampling.pipeline import ClipShape, sample_clips
from sora_train.training.pipeline.data import TrainingData


def write_samples(
    folder: Path | None,
    model: nn.Module,
    vae: VideoVAE,
    spec: DiffusionSpec,
    prompts: list[str],
    shape: ClipShape,
    *,
    seed: int,
    on_step: Callable[[int], None],
) -> None:
    """Sample `prompts`, one clip each, and write them into `folder`.

    Every rank calls this and computes; a rank whose `folder` is None writes nothing.

    Args:
        on_step: called with the number of the sampler's steps done, after each.
    """
    model.eval()
    try:
        clips = sample_clips(model, vae, spec, prompts, shape, seed=seed, on_step=on_step)
    finally:
        model.train()
    if folder is not None:
        save_clips(folder, clips, prompts, fps=shape.fps, seeds=[seed] * len(prompts))


def sample_prompts(cfg: Config, data: TrainingData) -> list[str]:
    """`sample.prompts`, else the captions of held-out clips, else of training clips."""
    configured = list(cfg.sample.prompts)
    held_out = [clip.caption for clip in data.val_clips]
    trained = [str(data.manifest.caption[row]) for row in data.tape.rows[:8]]
    return (configured or held_out or trained)[: cfg.sample.max_prompts]


def sample_shape(cfg: Config, data: TrainingData) -> ClipShape:
    """The bucket with the most clips, a video's if there is any; the longest among equals."""
    counts = data.assignment.clips_per_bucket(data.table)
    filled = [spec.bucket for spec in data.table if counts.get(spec.bucket.name, 0) > 0]
    bucket = max(filled, key=lambda b: (b.frames > 1, counts[b.name], b.frames))
    return ClipShape(bucket.frames, bucket.height, bucket.width, cfg.buckets.fps)
