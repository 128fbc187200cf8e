"""`sora bench vae`: how well a VAE gives held-out clips back, beside how much it compresses them."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.sample import Clip
from sora_train.device import measuring
from sora_train.device.measuring import Measured, Result, Stats
from sora_train.errors import UserError
from sora_train.evaluation.quality import psnr, ssim
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import to_pixels
from sora_train.runtime.world import pick_device
from sora_train.training.pipeline.validation_clips import held_out_clips

DEFAULT_EXPERIMENT = "experiment=quickstart"
DEFAULT_OUT = Path("benchmarks/results")


def main(arguments: Sequence[str]) -> int:
    """Run `[overrides] [--clips N] [--out DIR]`, print the result; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sora bench vae", allow_abbrev=False)
    parser.add_argument("--clips", type=int, default=32, help="held-out clips, at most")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of vae.json, vae.md")
    options, overrides = parser.parse_known_args(list(arguments))
    path = run(overrides, clips=options.clips, out=options.out)
    print(path.with_suffix(".md").read_text())
    return 0


def run(overrides: list[str], *, clips: int, out: Path) -> Path:
    """Encode and decode held-out clips of the config's source; write `out`/vae.json and vae.md.

    Without `experiment=` in the Hydra `overrides` source and VAE are the quickstart's.

    Raises:
        UserError: no clips, or the source cannot be used.
        ConfigError: an override is wrong.
    """
    if clips < 1:
        raise UserError(f"--clips {clips}: measure at least one")
    named = any(override.startswith("experiment=") for override in overrides)
    chosen = [*([] if named else [DEFAULT_EXPERIMENT]), *overrides]
    limits = [f"validation.max_clips={clips}", "tracker=none"]
    cfg: Config = compose([*chosen, *limits]).config
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    vae = VideoVAE.from_config(cfg.vae).to(pick_device(cfg.run.device))
    held_out = read_held_out(cfg, vae)
    measured = measure(vae, held_out)
    frame, side = vae.temporal_factor, vae.spatial_factor
    facts: dict[str, str | int | float | None] = {
        "overrides": " ".join(chosen),
        "source": cfg.data.source,
        "compression, values of a clip a value of its latents": compression(vae, held_out),
        "latents": f"{vae.channels} channels, {frame}x{side}x{side}",
        "clips": len(held_out),
        "VAE": cfg.vae.path or "random weights",
        "digest": vae.digest()[:16],
        "dtype": cfg.vae.dtype,
        "tile": cfg.vae.tile,
    }
    return Result("vae", measured, facts).write(Path(out))


def read_held_out(cfg: Config, vae: VideoVAE) -> list[Clip]:
    """Held-out clips, cut as validation cuts them. Raises UserError where there are none."""
    found = held_out_clips(cfg, vae, with_latents=False)
    if not found:
        raise UserError(
            f"data.source={cfg.data.source} has no held-out clip that fits a bucket; hold some out "
            "(data.val_fraction) or name other buckets"
        )
    return found


@torch.no_grad()
def measure(vae: VideoVAE, clips: list[Clip]) -> dict[str, Measured]:
    """Both likenesses and the speed of each way, a number a clip."""
    device = next(vae.parameters()).device
    found: dict[str, list[float]] = {
        name: [] for name in ("PSNR", "SSIM", "encode, frames a second", "decode, frames a second")
    }
    for clip in clips:
        pixels = to_pixels([clip], device)
        began = now()
        latents = vae.encode(pixels)
        encoded = now()
        back = vae.decode(latents)
        decoded = now()
        values = (
            float(psnr(back, pixels)),
            float(ssim(back, pixels)),
            pixels.shape[2] / (encoded - began),
            pixels.shape[2] / (decoded - encoded),
        )
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
    units = ("dB", "1", "frames/s", "frames/s")
    return {
        name: Measured(Stats.of(values), unit)
        for (name, values), unit in zip(found.items(), units, strict=True)
    }


def now() -> float:
    """Seconds, once the device has done everything so far."""
    measuring.synchronize()
    return time.perf_counter()


def compression(vae: VideoVAE, clips: list[Clip]) -> float:
    """Values of all clips over values of their latents: what the factors make of real lengths."""
    inside = outside = 0
    for clip in clips:
        assert clip.pixels is not None
        frames, height, width, _ = clip.pixels.shape
        channels, t, h, w = vae.latent_shape(frames, height, width)
        outside += 3 * frames * height * width
        inside += channels * t * h * w
    return outside / inside
