"""The transformer's sizes in the words of diffusers' WanTransformer3DModel, both ways.

Parameter names are the same, so sizes are all there is to translate.
"""

from collections.abc import Mapping
from typing import Any

from sora_train.config.sections.model import ModelConfig
from sora_train.errors import UserError

CLASS_NAME = "WanTransformer3DModel"


def wan_arguments(cfg: ModelConfig) -> dict[str, Any]:
    """The sizes as arguments of diffusers' WanTransformer3DModel."""
    return {
        "patch_size": cfg.patch_size, "num_attention_heads": cfg.num_heads,
        "attention_head_dim": cfg.head_dim, "in_channels": cfg.in_channels,
        "out_channels": cfg.velocity_channels, "text_dim": cfg.text_dim, "freq_dim": cfg.freq_dim,
        "ffn_dim": cfg.ffn_dim, "num_layers": cfg.num_layers, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "eps": cfg.eps, "rope_max_seq_len": cfg.rope_max_length,
        "image_dim": cfg.image_dim or None, "added_kv_proj_dim": cfg.dim if cfg.image_dim else None,
        "pos_embed_seq_len": 2 * cfg.image_tokens if cfg.image_pair else None,
    }  # fmt: skip


def model_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of the section `model` for a config.json. How many embeddings an image has is not said there, but for a
    model of two. Raises UserError naming what does not fit."""
    name = config.get("_class_name")
    if name != CLASS_NAME:
        raise UserError(
            f"{where} describes a {name or 'model without a class'}; what can be imported is {CLASS_NAME} "
            "(Wan 2.1 and 2.2)"
        )
    expected = {"qk_norm": "rms_norm_across_heads", "cross_attn_norm": True}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UserError(f"{where} has {key}={config[key]}; only {value} can be imported")
    try:
        heads, width = int(config["num_attention_heads"]), int(config["attention_head_dim"])
        channels, made = int(config["in_channels"]), int(config.get("out_channels") or 0)
        _require_image_sizes(config, heads * width, where)
        return {
            "num_heads": heads, "head_dim": width, "in_channels": channels,
            "out_channels": 0 if made == channels else made,
            "patch_size": list(config["patch_size"]), "num_layers": int(config["num_layers"]),
            "ffn_dim": int(config["ffn_dim"]), "text_dim": int(config["text_dim"]),
            "freq_dim": int(config["freq_dim"]), "eps": float(config.get("eps", 1e-6)),
            "rope_max_length": int(config.get("rope_max_seq_len", 1024)), "qk_norm": True,
            **_image_values(config),
        }  # fmt: skip
    except KeyError as error:
        raise UserError(
            f"{where} does not say {error}; it is no config of a {CLASS_NAME}"
        ) from error


def _require_image_sizes(config: Mapping[str, Any], dim: int, where: str) -> None:
    """Raises UserError where what is said of images is not Wan's: tokens attend to embeddings of the model width."""
    expected = dim if config.get("image_dim") else None
    if config.get("added_kv_proj_dim") != expected:
        raise UserError(
            f"{where} has image_dim={config.get('image_dim')} and added_kv_proj_dim={config.get('added_kv_proj_dim')}; "
            f"what can be imported has added_kv_proj_dim={expected}, the width of the model, where it takes images"
        )
    positions = config.get("pos_embed_seq_len")
    if positions and (positions % 2 or not expected):
        raise UserError(
            f"{where} has pos_embed_seq_len={positions}; what can be imported has positions of two images of equal "
            "length, and image_dim"
        )


def _image_values(config: Mapping[str, Any]) -> dict[str, Any]:
    if not config.get("image_dim"):
        return {}
    positions = config.get("pos_embed_seq_len")
    pair = {"image_pair": True, "image_tokens": positions // 2} if positions else {}
    return {"image_dim": int(config["image_dim"]), **pair}
