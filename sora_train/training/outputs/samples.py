"""Samples that a run makes of itself: of which prompts, in which shape, and where they go."""

import sys

from sora_train.config import Config
from sora_train.sampling.files import save_clips
from sora_train.sampling.pipeline import ClipShape, NoPicture, sample_clips
from sora_train.training.components import Components
from sora_train.training.pipeline.data import TrainingData
from sora_train.training.pipeline.frame_rates import usual_rate
from sora_train.training.run import RunContext


def write_samples(run: RunContext, parts: Components, step: int) -> None:
    """Sample the configured prompts with the averaged weights into samples/step-N.

    Every rank calls this and computes; the first one writes. Nothing happens where `sample.every` is 0, or where the
    model has no diffusion spec to sample by.
    """
    cfg, model, spec = run.cfg, parts.engine.model, parts.spec
    prompts = sample_prompts(cfg, parts.data)
    if cfg.sample.every == 0 or spec is None or not prompts:
        return
    shape, seed = sample_shape(cfg, parts.data), cfg.sample.seed
    with run.health.phase("samples"), parts.averaged():
        model.eval()
        try:
            clips = sample_clips(
                model,
                parts.vae,
                spec,
                prompts,
                shape,
                seed=seed,
                on_step=lambda _: run.health.check_preemption(),
            )
        except NoPicture as error:
            # Training goes on: its own guards see to weights that diverge.
            if run.is_main:
                print(f"no samples of step {step}: {error}", file=sys.stderr, flush=True)
            return
        finally:
            model.train()
    if run.is_main:
        folder = run.folder.samples(step)
        save_clips(folder, clips, prompts, fps=shape.fps, seeds=[seed] * len(prompts))


def sample_prompts(cfg: Config, data: TrainingData) -> list[str]:
    """`sample.prompts`, else the captions of held-out clips, else of training clips."""
    configured = list(cfg.sample.prompts)
    held_out = [clip.caption for clip in data.val_clips]
    trained = [str(data.manifest.caption[row]) for row in data.tape.rows[:8]]
    return (configured or held_out or trained)[: cfg.sample.max_prompts]


def sample_shape(cfg: Config, data: TrainingData) -> ClipShape:
    """The bucket with the most clips, a video's if there is any, the longest among equals; its clips' usual rate."""
    counts = data.assignment.clips_per_bucket(data.table)
    filled = [spec.bucket for spec in data.table if counts.get(spec.bucket.name, 0) > 0]
    bucket = max(filled, key=lambda b: (b.frames > 1, counts[b.name], b.frames))
    rate = usual_rate(cfg, data, bucket)
    return ClipShape(bucket.frames, bucket.height, bucket.width, rate)
