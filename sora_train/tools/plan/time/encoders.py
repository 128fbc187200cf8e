"""What the frozen networks cost: the VAE that encodes each clip, the text encoder that reads each caption."""

from pathlib import Path
from typing import Any

from sora_train.config import Config
from sora_train.config.sections.model import TextConfig
from sora_train.models.flops import text_flops
from sora_train.models.vae.geometry import Geometry
from sora_train.tools.plan.memory.encoders import BY_CHANNELS, UMT5_XXL, sizes_of_vae


def geometry_of(cfg: Config) -> tuple[Geometry, str]:
    """Shape of the VAE's latents, without its weights; and in words where its sizes are taken from, if from
    elsewhere."""
    geometry, path = Geometry.of(sizes_of_vae(cfg)), cfg.vae.path
    if not path or path.startswith("shipped:") or Path(path).exists():
        return geometry, ""
    origin = f"vae={BY_CHANNELS[geometry.channels]}"
    return geometry, f"{path} is not on this machine; its sizes are those of {origin}"


def vae_flops(arch: dict[str, Any], pixels: int) -> float:
    """Operations of AutoencoderKLWan's encoder for a clip of so many pixels (frames x height x width).

    Its 3x3x3 convolutions, two in each residual block, on levels that halve height and width and, where told, frames;
    the rest is below a tenth of that.
    """
    base, mult = arch.get("base_dim", 96), arch.get("dim_mult", (1, 2, 4, 4))
    in_time = arch.get("temperal_downsample", (False, True, True))
    blocks, patch = arch.get("num_res_blocks", 2), arch.get("patch_size") or 1
    places = pixels / patch**2
    total, width = 0.0, base
    for level, factor in enumerate(mult):
        wide = base * factor
        total += places * 2 * 27 * (width * wide + (2 * blocks - 1) * wide * wide)
        width = wide
        if level < len(in_time):
            total += places / 4 * 2 * 9 * wide * wide
            places /= 8 if in_time[level] else 4
    # The middle: two residual blocks.
    return total + places * 2 * 27 * 4 * width * width


def caption_flops(cfg: TextConfig, tokens: int) -> float:
    """Operations of one caption's pass through the text encoder, padded to `tokens`."""
    if cfg.kind in ("umt5", "t5") and cfg.d_model == UMT5_XXL["d_model"]:
        cfg = cfg.model_copy(update=UMT5_XXL)
    return float(text_flops(cfg, min(tokens, cfg.max_length)))
