"""What the frozen networks hold: their weights, and what encoding a clip and its caption takes at its height.

The VAE is built on fake tensors from its sizes, so that its weights need not be here.
"""

import json
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sora_train.config import Config
from sora_train.config.sections.model import TextConfig
from sora_train.config.yaml_files import find_configs, load_yaml
from sora_train.data.sample import Bucket
from sora_train.errors import ConfigError
from sora_train.models.memory import text_parameters
from sora_train.models.vae.autoencoder import stored_folder
from sora_train.models.vae.geometry import Geometry
from sora_train.models.vae.published import WAN
from sora_train.models.vae.stream import encode_raw
from sora_train.tools.plan.memory.count import Held

BY_CHANNELS = {16: "wan_2_1", 48: "wan_2_2"}
"""Latent channels -> the shipped sizes that are taken for a VAE that is not on this machine."""
UMT5_XXL = {"d_model": 4096, "num_layers": 24, "num_heads": 64, "d_kv": 64, "d_ff": 10240}
UMT5_VOCABULARY, BYTE_VOCABULARY = 256_384, 384
PIECE = 4
"""Latent frames over which the encoder's memory is seen to grow with the clip."""


def sizes_of_vae(cfg: Config) -> dict[str, object]:
    """The VAE's sizes: of its folder, of the config, or of the published one with so many channels."""
    if not cfg.vae.path:
        return dict(cfg.vae.arch)
    if cfg.vae.path.startswith("shipped:") or Path(cfg.vae.path).exists():
        config = json.loads((stored_folder(cfg.vae) / "config.json").read_text())
        if config.get("_class_name", WAN) == WAN:
            return {key: value for key, value in config.items() if not key.startswith("_")}
    name = BY_CHANNELS.get(cfg.model.velocity_channels)
    if name is None:
        raise ConfigError(
            f"vae.path={cfg.vae.path} is not on this machine, and no published VAE has the "
            f"{cfg.model.velocity_channels} channels that the model makes; fetch it first, or give vae.arch"
        )
    arch = load_yaml(find_configs() / "vae" / f"{name}.yaml")["arch"]
    assert isinstance(arch, dict)
    return arch


def latent_shape(cfg: Config, bucket: Bucket) -> tuple[int, int, int, int]:
    """(C, T, H, W) of a clip's latents."""
    geometry = Geometry.of(sizes_of_vae(cfg))
    return geometry.latent_shape(bucket.frames, bucket.height, bucket.width)


def frozen_text_bytes(cfg: TextConfig) -> tuple[int, int]:
    """(bytes of a frozen encoder's weights, bytes that one caption takes at the height of its encoding)."""
    if cfg.trainable:
        return 0, 0
    published = bool(cfg.path)
    sizes = cfg
    if published and cfg.d_model == UMT5_XXL["d_model"]:
        sizes = cfg.model_copy(update=UMT5_XXL)
    itemsize = getattr(torch, cfg.dtype).itemsize
    values = text_parameters(sizes)
    if published:
        values += (UMT5_VOCABULARY - BYTE_VOCABULARY) * sizes.d_model
    length = cfg.max_length
    # Its attention is eager: scores as they are and their softmax in float32.
    scores = 2 * sizes.num_heads * length * length * 4
    widths = length * (4 * sizes.num_heads * sizes.d_kv + 3 * sizes.d_ff + 3 * sizes.d_model) * 4
    return values * itemsize, scores + widths


def vae_bytes(cfg: Config, bucket: Bucket) -> tuple[int, int]:
    """(bytes of the VAE's weights, bytes that encoding one clip takes at its height).

    The encoder takes a few frames at a time: what grows with the clip are its pixels and its latents.
    """
    arch = sizes_of_vae(cfg)
    geometry = Geometry.of(arch)
    most = 1 + 2 * PIECE * geometry.temporal_factor
    if bucket.frames <= most:
        return _encoded(cfg, arch, bucket)
    short = Bucket(1 + PIECE * geometry.temporal_factor, bucket.height, bucket.width)
    longer = Bucket(most, bucket.height, bucket.width)
    weights, low = _encoded(cfg, arch, short)
    _, high = _encoded(cfg, arch, longer)
    each = (high - low) / (longer.frames - short.frames)
    return weights, round(high + each * (bucket.frames - longer.frames))


def _encoded(cfg: Config, arch: dict[str, object], bucket: Bucket) -> tuple[int, int]:
    from diffusers import AutoencoderKLWan

    held = Held()
    with FakeTensorMode(), held, torch.no_grad():
        vae = AutoencoderKLWan(**arch).requires_grad_(False)
        for parameter in vae.parameters():
            parameter.data = parameter.data.to(getattr(torch, cfg.vae.dtype))
        weights = sum(p.numel() * p.element_size() for p in vae.parameters())
        before = held.total
        held.during("encode")
        tile = cfg.vae.tile // Geometry.of(arch).spatial_factor
        latents = encode_raw(vae, pixels_of(bucket), tile)
        held.during("")
        del latents
    return weights, sum(held.peaks["encode"].values()) - before


def pixels_of(bucket: Bucket) -> Tensor:
    """One clip as it comes from bytes: (1, 3, F, H, W) float32."""
    stacked = torch.empty(1, bucket.frames, bucket.height, bucket.width, 3, dtype=torch.uint8)
    return stacked.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0
