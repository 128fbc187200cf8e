"""An adapter as a safetensors file for diffusers' `load_lora_weights`, or with ComfyUI's names.

diffusers reads both. It takes the scale of its own layout from the header alone, and without it takes alpha for the
rank; of ComfyUI's it takes `.alpha`, but only in the blocks.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from sora_train.base.files import renamed_when_whole
from sora_train.errors import UserError
from sora_train.models.adapters.factors import AdapterWeights
from sora_train.models.adapters.files.header import header_of
from sora_train.models.adapters.files.names import our_name, wan_name
from sora_train.models.adapters.files.reading import CONFIG_KEY

Layout = Literal["diffusers", "comfyui"]
LAYOUTS: tuple[Layout, ...] = ("diffusers", "comfyui")


def write_adapter(adapter: AdapterWeights, path: Path, layout: Layout, *, title: str = "") -> None:
    """Write the file, whole or not at all; an older one of this name is replaced.

    Args:
        title: what people are shown; default: the file's name.

    Raises:
        UserError: the adapter changes what the layout has no name for.
    """
    foreign = [name for name in adapter.modules if our_name(name) is None]
    if foreign:
        raise UserError(
            f"the adapter changes {foreign[0]}, which Wan's model lacks, so {layout} cannot load it; train with "
            "adapter.targets that leave it out, or merge it (`sora ckpt merge`)"
        )
    header = header_of(adapter.about, title or path.stem)
    if layout == "diffusers":
        tensors, header[CONFIG_KEY] = _for_diffusers(adapter)
    else:
        tensors = _for_comfyui(adapter)
    with renamed_when_whole(path) as partial:
        save_file(
            {name: one.contiguous() for name, one in tensors.items()}, partial, metadata=header
        )
        partial.chmod(0o644)


def _for_diffusers(adapter: AdapterWeights) -> tuple[dict[str, Tensor], str]:
    if adapter.differences:
        raise UserError(
            f"the adapter adds to whole parameters ({next(iter(adapter.differences))}), which diffusers' layout has no "
            "keys for; export it with --to comfyui, or merge it"
        )
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.modules.items():
        tensors[f"transformer.{name}.lora_A.weight"] = factors.down
        tensors[f"transformer.{name}.lora_B.weight"] = factors.up
        if factors.magnitude is not None:
            tensors[f"transformer.{name}.lora_magnitude_vector"] = factors.magnitude
    config = _lora_config(adapter)
    prefixed = {f"transformer.{name}": value for name, value in config.items()}
    return tensors, json.dumps(prefixed, indent=2, sort_keys=True)


def _lora_config(adapter: AdapterWeights) -> dict[str, Any]:
    """Arguments of peft's LoraConfig by which each module gets its scale."""
    rslora = bool(adapter.about.rslora)
    ranks = {name: factors.rank for name, factors in adapter.modules.items()}
    alphas = {
        name: factors.scale * (math.sqrt(factors.rank) if rslora else factors.rank)
        for name, factors in adapter.modules.items()
    }
    rank, other_ranks = _usual(ranks)
    alpha, other_alphas = _usual(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": other_ranks,
        "alpha_pattern": other_alphas,
        "target_modules": list(adapter.modules),
        "use_rslora": rslora,
        "use_dora": any(factors.magnitude is not None for factors in adapter.modules.values()),
    }


def _usual(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and the modules that have another, as patterns that match nothing else."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {f"^{name}": value for name, value in values.items() if value != usual}


def _for_comfyui(adapter: AdapterWeights) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, factors in adapter.modules.items():
        key, up = f"diffusion_model.{wan_name(name)}", factors.up
        if name.startswith("blocks."):
            tensors[f"{key}.alpha"] = torch.tensor(factors.scale * factors.rank)
        else:
            # diffusers has no alpha outside the blocks, and no alpha is a scale of 1 to everyone.
            up = factors.scale * up
        tensors[f"{key}.lora_down.weight"] = factors.down
        tensors[f"{key}.lora_up.weight"] = up
        if factors.magnitude is not None:
            tensors[f"{key}.dora_scale"] = factors.magnitude[:, None]
    for name, difference in adapter.differences.items():
        tensors[f"diffusion_model.{_difference_key(name)}"] = difference
    return tensors


def _difference_key(parameter: str) -> str:
    """ComfyUI's key of what is added to a parameter."""
    module, _, kind = parameter.rpartition(".")
    if kind == "scale_shift_table":
        return f"{module or 'head'}.diff_m"
    return f"{wan_name(module)}.{'diff_b' if kind == 'bias' else 'diff'}"
