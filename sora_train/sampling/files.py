"""Sample clips as files: mp4 a prompt, a contact sheet, and the prompts beside them."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sora_train.base.contact_sheet import contact_sheet
from sora_train.base.files import write_atomically
from sora_train.data.decode.video_io import encode_h264
from sora_train.sampling.pipeline import ClipShape, sample_clips

if TYPE_CHECKING:
    from sora_train.training.trainer import Trainer


def save_clips(
    folder: Path, clips: list[np.ndarray], prompts: list[str], *, fps: float, seeds: list[int]
) -> list[Path]:
    """Write `000.mp4` ..., `contact_sheet.png` and `prompts.json`; returns the clips' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, clip in enumerate(clips):
        path = folder / f"{i:03d}.mp4"
        encode_h264(clip, fps, path)
        paths.append(path)
    contact_sheet(clips, prompts, folder / "contact_sheet.png")
    rows = [
        {"prompt": prompt, "file": path.name, "seed": seed}
        for prompt, path, seed in zip(prompts, paths, seeds, strict=True)
    ]
    write_atomically(folder / "prompts.json", json.dumps(rows, indent=1))
    return paths


def save_stills(clips: list[np.ndarray], paths: list[Path]) -> list[Path]:
    """Write clips of a single frame as PNG beside their mp4 files; returns the images' paths."""
    stills = []
    for clip, path in zip(clips, paths, strict=True):
        if len(clip) == 1:
            still = path.with_suffix(".png")
            partial = still.with_name(f".{still.name}.tmp")
            Image.fromarray(clip[0]).save(partial, format="PNG")
            os.replace(partial, still)
            stills.append(still)
    return stills


def write_samples(trainer: "Trainer") -> None:
    """Sample the configured prompts into samples/step-N; every rank computes, rank 0 writes."""
    prompts = sample_prompts(trainer)
    if not prompts:
        return
    model = trainer.engine.model
    model.eval()
    try:
        shape = sample_shape(trainer)
        clips = sample_clips(
            model, trainer.vae, trainer.spec, prompts, shape, seed=trainer.cfg.sample.seed,
            on_step=lambda _: trainer.health.heed(),
        )  # fmt: skip
    finally:
        model.train()
    if trainer.world.is_main:
        save_clips(
            trainer.folder.samples(trainer.step),
            clips,
            prompts,
            fps=shape.fps,
            seeds=[trainer.cfg.sample.seed] * len(prompts),
        )


def sample_prompts(trainer: "Trainer") -> list[str]:
    """`sample.prompts`, else the captions of held-out clips, else of training clips."""
    configured = list(trainer.cfg.sample.prompts)
    held_out = [clip.caption for clip in trainer.data.val_clips]
    trained = [str(trainer.data.manifest.caption[row]) for row in trainer.data.tape.rows[:8]]
    return (configured or held_out or trained)[: trainer.cfg.sample.max_prompts]


def sample_shape(trainer: "Trainer") -> ClipShape:
    """The bucket with the most clips, a video's if there is any; the longest among equals."""
    data = trainer.data
    counts = data.assignment.clips_per_bucket(data.table)
    filled = [spec.bucket for spec in data.table if counts.get(spec.bucket.name, 0) > 0]
    bucket = max(filled, key=lambda b: (b.frames > 1, counts[b.name], b.frames))
    return ClipShape(bucket.frames, bucket.height, bucket.width, trainer.cfg.buckets.fps)
