"""The transformer's sizes in the words of diffusers' WanTransformer3DModel, both ways.

Parameter names are the same, so sizes are all there is to translate.
"""

from collections.abc import Mapping
from typing import Any

from sora_train.config.sections.model import ModelConfig
from sora_train.errors import UserError

CLASS_NAME = "WanTransformer3DModel"
# What other members of the family have and this transformer lacks.
_ABSENT = {
    "image_dim": "an image encoder's embeddings",
    "added_kv_proj_dim": "attention to an image's embeddings",
    "pos_embed_seq_len": "positions of an image's embeddings",
}


def wan_arguments(cfg: ModelConfig) -> dict[str, Any]:
    """The sizes as arguments of diffusers' WanTransformer3DModel."""
    return {
        "patch_size": cfg.patch_size, "num_attention_heads": cfg.num_heads,
        "attention_head_dim": cfg.head_dim, "in_channels": cfg.in_channels,
        "out_channels": cfg.velocity_channels, "text_dim": cfg.text_dim, "freq_dim": cfg.freq_dim,
        "ffn_dim": cfg.ffn_dim, "num_layers": cfg.num_layers, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "eps": cfg.eps, "rope_max_seq_len": cfg.rope_max_length,
    }  # fmt: skip


def model_values(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys of the section `model` for a config.json. Raises UserError naming what does not fit."""
    name = config.get("_class_name")
    if name != CLASS_NAME:
        raise UserError(
            f"{where} describes a {name or 'model without a class'}; what can be imported is {CLASS_NAME} "
            "(Wan 2.1 T2V, Wan 2.2 TI2V)"
        )
    for key, what in _ABSENT.items():
        if config.get(key) is not None:
            raise UserError(
                f"{where} has {key}={config[key]}, {what}, which this transformer lacks; import a text-to-video "
                "model (Wan 2.1 T2V, Wan 2.2 TI2V)"
            )
    expected = {"qk_norm": "rms_norm_across_heads", "cross_attn_norm": True}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UserError(f"{where} has {key}={config[key]}; only {value} can be imported")
    try:
        heads, width = int(config["num_attention_heads"]), int(config["attention_head_dim"])
        channels, made = int(config["in_channels"]), int(config.get("out_channels") or 0)
        return {
            "num_heads": heads, "head_dim": width, "in_channels": channels,
            "out_channels": 0 if made == channels else made,
            "patch_size": list(config["patch_size"]), "num_layers": int(config["num_layers"]),
            "ffn_dim": int(config["ffn_dim"]), "text_dim": int(config["text_dim"]),
            "freq_dim": int(config["freq_dim"]), "eps": float(config.get("eps", 1e-6)),
            "rope_max_length": int(config.get("rope_max_seq_len", 1024)), "qk_norm": True,
        }  # fmt: skip
    except KeyError as error:
        raise UserError(
            f"{where} does not say {error}; it is no config of a {CLASS_NAME}"
        ) from error
