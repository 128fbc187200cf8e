"""Tiny pipelines of Wan's family: every part is of the class that diffusers or transformers has, its weights random."""

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

TRANSFORMER = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=64,
)  # fmt: skip
VAE = dict(
    base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.0, 0.3],
    latents_std=[0.9, 1.1, 1.2, 0.8],
)  # fmt: skip
CLIP = dict(
    hidden_size=20,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
TEXT = dict(d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16, vocab_size=384)
TAKES_FRAMES = dict(in_channels=12)
"""4 noisy channels, 4 of the mask and 4 of the given frames."""
IMAGE = dict(**TAKES_FRAMES, image_dim=20, added_kv_proj_dim=24)


def drawn(model: torch.nn.Module, seed: int) -> Any:
    """Weights that are nowhere zero, norms about one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            scale = math.prod(parameter.shape[1:]) ** -0.5
            parameter.copy_(value * scale * 0.7 + float("norm" in name and parameter.ndim == 1))
    return model.eval()


def transformer(seed: int, **changes: Any) -> WanTransformer3DModel:
    return drawn(WanTransformer3DModel(**{**TRANSFORMER, **changes}), seed)


def pipeline(
    folder: Path, sizes: dict[str, Any], *, second: bool = False, boundary: float | None = None
) -> Path:
    """Write the pipeline that has a transformer of these sizes, with `second` two of them."""
    parts: dict[str, Any] = dict(
        tokenizer=transformers.ByT5Tokenizer(),
        text_encoder=drawn(transformers.UMT5EncoderModel(transformers.UMT5Config(**TEXT)), 1),
        vae=drawn(AutoencoderKLWan(**VAE), 2),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer(3, **sizes),
        transformer_2=transformer(4, **sizes) if second else None,
        boundary_ratio=boundary,
    )
    if sizes.get("in_channels", 4) == 4:
        WanPipeline(**parts).save_pretrained(folder)
        return folder
    if "image_dim" in sizes:
        sizes_of_clip = transformers.CLIPVisionConfig(**CLIP)
        parts["image_encoder"] = drawn(transformers.CLIPVisionModel(sizes_of_clip), 5)
        parts["image_processor"] = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        )
    WanImageToVideoPipeline(**parts).save_pretrained(folder)
    return folder
