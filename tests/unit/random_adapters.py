"""Adapters of random numbers for a tiny Wan, none of them at its first value of zero."""

import math
from collections.abc import Mapping

import torch

from sora_train.models.adapters.factors import AdapterFacts, AdapterWeights, Factors

IN_BLOCK = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k",
    "attn2.to_v", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2",
)  # fmt: skip
OUTSIDE = (
    "condition_embedder.text_embedder.linear_1", "condition_embedder.text_embedder.linear_2",
    "condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_proj", "proj_out",
)  # fmt: skip
IMAGE = (
    "blocks.0.attn2.add_k_proj", "blocks.0.attn2.add_v_proj", "blocks.1.attn2.add_k_proj",
    "blocks.1.attn2.add_v_proj", "condition_embedder.image_embedder.ff.net.0.proj",
    "condition_embedder.image_embedder.ff.net.2",
)  # fmt: skip
"""What an image-to-video model of Wan 2.1 has beside."""
MODULES = (*(f"blocks.{index}.{name}" for index in (0, 1) for name in IN_BLOCK), *OUTSIDE)


def tiny_wan(**more: int) -> torch.nn.Module:
    """diffusers' own transformer, its weights random."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    wan = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
        out_channels=16, text_dim=12, freq_dim=32, ffn_dim=40, num_layers=2, rope_max_seq_len=64, **more,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in wan.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return wan.eval()


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers."""
    layers = model.named_modules()
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in layers
        if isinstance(layer, torch.nn.Linear)
    }


def random_adapter(
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    rslora: bool = False,
    dora: bool = False,
    seed: int = 0,
    about: AdapterFacts | None = None,
) -> AdapterWeights:
    """Factors of the size that change what a model computes, one for each module of `ranks`."""
    draws = torch.Generator().manual_seed(seed)
    modules = {}
    for name, rank in ranks.items():
        out, width = shapes[name]
        down = torch.randn(rank, width, generator=draws) / width**0.5
        up = torch.randn(out, rank, generator=draws) / rank**0.5
        magnitude = 0.5 + torch.rand(out, generator=draws) if dora else None
        scale = alphas[name] / (math.sqrt(rank) if rslora else rank)
        modules[name] = Factors(down, up, scale, magnitude)
    return AdapterWeights(modules, about or AdapterFacts(rslora=rslora))


def adapted(model: torch.nn.Module, *adapters: tuple[AdapterWeights, float]) -> torch.nn.Module:
    """A copy in float64 whose weights are changed one after the other."""
    import copy

    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for adapter, strength in adapters:
            for name, value in model.named_parameters():
                value.copy_(adapter.adapted(name, value, strength))
    return model
