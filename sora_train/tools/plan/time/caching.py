"""Whether to encode each clip once or each time it is trained: the GPU time and the disk of either.

Online, the frozen VAE and text encoder work on every clip of every step. Cached (`data.cache`), they work once on each
clip of the source, and windows and crops stay those of the first epoch.
"""

from dataclasses import dataclass

import torch

from sora_train.config import Config
from sora_train.tools.plan.assumptions import Assumptions
from sora_train.tools.plan.time.cluster import GB, Cluster
from sora_train.tools.plan.time.work import BucketWork, StageWork

REPEATS = 10
"""How often a run is taken to train each clip where `plan.clips` does not say how many there are."""


@dataclass(frozen=True)
class Caching:
    """What encoding costs a stage."""

    mode: str
    """`data.cache` as planned."""
    clips: float
    """Clips of the source."""
    trained: float
    """Clips that the stage trains, one as often as it comes."""
    once: float
    """GPU-seconds that encode every clip and caption once."""
    online: float
    """GPU-seconds that encode them each time they are trained."""
    gb: float
    """GB on disk of all latents and of the captions that `data.cache_text_gb` has room for."""
    spilled: float
    """Share of the captions that the cache has no room for: they are encoded each time."""
    why: str


def encode_seconds(
    work: BucketWork, cfg: Config, cluster: Cluster, assume: Assumptions
) -> tuple[float, float]:
    """(seconds of the VAE, seconds of the text encoder) for one clip of a bucket on one card."""
    gpu = cluster.gpu
    vae_peak = gpu.tflops if cfg.vae.dtype == "bfloat16" else gpu.tflops_fp32
    text_peak = gpu.tflops if cfg.text.dtype == "bfloat16" else gpu.tflops_fp32
    return (
        work.encode / (1e12 * vae_peak * assume.convolution),
        work.caption / (1e12 * text_peak * assume.captions),
    )


def caching_of(stage: StageWork, cluster: Cluster, assume: Assumptions) -> Caching:
    """The cheaper of both ways, or with `plan.keep_layout` that of the config, with the reason."""
    cfg, works = stage.cfg, stage.works
    clips_a_step = cfg.train.micro_batches / sum(work.share / work.clips for work in works)
    trained = cfg.train.steps * clips_a_step
    clips = float(assume.clips or max(1.0, trained / REPEATS))

    def mean(values: list[float]) -> float:
        return sum(work.share * value for work, value in zip(works, values, strict=True))

    seconds = [encode_seconds(work, cfg, cluster, assume) for work in works]
    video, text = mean([vae for vae, _ in seconds]), mean([caption for _, caption in seconds])
    latents = clips * mean([float(work.stored) for work in works]) / GB
    itemsize = getattr(torch, cfg.text.dtype).itemsize
    caption_gb = assume.caption_tokens * cfg.text.d_model * itemsize / GB
    wanted = 0.0 if cfg.text.trainable else clips * caption_gb
    spilled = max(0.0, 1 - cfg.data.cache_text_gb / wanted) if wanted else 0.0
    gb = latents + wanted * (1 - spilled)
    once = clips * (video + text) + trained * spilled * text
    online = trained * (video + text)
    mode, why = _choice(cfg, assume, once < online, gb)
    return Caching(mode, clips, trained, once, online, gb, spilled, why)


def _choice(cfg: Config, assume: Assumptions, cheaper: bool, gb: float) -> tuple[str, str]:
    """`data.cache`, and why."""
    asked = cfg.data.cache
    if assume.keep_layout:
        return asked, "as the config has it"
    if cfg.objective.needs_pixels:
        return "none", "the objective encodes given frames from pixels, which a cache does not keep"
    if not cheaper:
        return "none", "each clip is trained about once, so a cache saves nothing"
    if assume.disk_gb and gb > assume.disk_gb:
        return "none", f"a cache takes {gb:,.0f} GB, more than plan.disk_gb={assume.disk_gb:,.0f}"
    return asked if asked != "none" else "latents", "it takes less time, and fits the disk"
