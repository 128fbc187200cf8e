"""An adapter from a safetensors file of diffusers, peft, ComfyUI, kohya's or musubi's tools, whichever names it has.

The layouts differ in three things: the prefix of a key, the module's name behind it, and the part that ends it. Each
is looked up by itself, so that mixtures are read too. The scale comes from `.alpha` beside the factors, or from the
LoraConfig in diffusers' header or beside peft's file; where there is neither it is 1, as in those tools.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sora_train.base.files import read_json
from sora_train.errors import UserError
from sora_train.models.adapters.factors import AdapterFacts, AdapterWeights, Factors
from sora_train.models.adapters.files.header import facts_of
from sora_train.models.adapters.files.names import our_name
from sora_train.models.finite_weights import require_finite

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PICKLED = (b"PK\x03\x04", b"\x80")
"""What torch's files begin with, a zip of pickles or one pickle."""
CONFIG_KEY = "lora_adapter_metadata"
"""Of the header: JSON of peft's LoraConfig, by which diffusers knows alpha."""
PEFT_CONFIG = "adapter_config.json"
KNOWN = (
    "diffusers' and peft's (transformer.blocks.0.attn1.to_q.lora_A.weight), ComfyUI's "
    "(diffusion_model.blocks.0.self_attn.q.lora_down.weight) and kohya's "
    "(lora_unet_blocks_0_self_attn_q.lora_down.weight)"
)
SHOWN = 5
_PREFIX = re.compile(
    r"base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|transformer\.|lora_unet_|"
)
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<down>lora_A(\.\w+)?|lora_down|lora\.down)\.weight|"
    r"(?P<up>lora_B(\.\w+)?|lora_up|lora\.up)\.weight|"
    r"(?P<bias>lora_B(\.\w+)?|lora_up)\.bias|"
    r"(?P<magnitude>lora_magnitude_vector(\.\w+)?(\.weight)?|dora_scale)|"
    r"(?P<alpha>alpha)|(?P<diff>diff)|(?P<diff_b>diff_b)|(?P<diff_m>diff_m))"
)
Parts = dict[str, dict[str, Tensor]]
"""Of each module, what the file holds: down, up, bias, magnitude, alpha, diff, diff_b, diff_m."""


def read_adapter(path: Path) -> AdapterWeights:
    """The adapter in a file, its tensors as they are stored.

    Raises:
        UserError: the file is missing, damaged or a pickle, has keys of no known layout, or its parts do not fit each
            other; it names the file and the key.
    """
    header, tensors = _content(path)
    config = _lora_config(path, header, tensors)
    return adapter_of_tensors(str(path), tensors, config, facts_of(header))


def adapter_of_tensors(
    where: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], about: AdapterFacts
) -> AdapterWeights:
    """The adapter in tensors of a known layout's names.

    Args:
        where: what a message calls the place they come from.
        config: peft's LoraConfig, or as much of it as is known: `lora_alpha`, `alpha_pattern`, `use_rslora`.

    Raises:
        UserError: keys of no known layout, or parts that do not fit each other.
    """
    parts = _sorted(where, tensors)
    modules, differences = dict[str, Factors](), dict[str, Tensor]()
    for module, held in parts.items():
        if {"down", "up"} & held.keys():
            modules[module] = _factors(where, module, held, config)
        differences |= _differences(where, module, held, modules.get(module))
    stray = [
        name
        for name, held in parts.items()
        if name not in modules and held.keys() & {"alpha", "magnitude"}
    ]
    if stray:
        raise UserError(
            f"{where} holds an alpha or a magnitude of {_some(stray)} and no factors for it; fetch the file again"
        )
    if not parts:
        raise UserError(f"{where} holds no tensors; known layouts of an adapter are {KNOWN}")
    return AdapterWeights(modules, _completed(about, modules, config), differences)


# -- the file -------------------------------------------------------------------------------------


def _content(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors, every one of them finite."""
    if not path.is_file():
        raise UserError(
            f"{path} is no file; give an adapter's .safetensors file, or a run's folder"
        )
    with path.open("rb") as file:
        begins = file.read(9)
    # A safetensors file begins with its header's length, which may be any bytes, and then the header, JSON.
    pickled = begins.startswith(_PICKLED) and begins[8:] != b"{"
    if path.suffix in PICKLES or pickled:
        raise UserError(
            f"{path} is a pickle, which could run code when it is read; save it as safetensors, where you trust it: "
            f"python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{path}', weights_only=True), "
            f"'{path.with_suffix('.safetensors')}')\""
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}); fetch it again"
        ) from error
    require_finite(tensors.items(), str(path), "fetch the file again, or take another step's")
    return header, tensors


def _lora_config(path: Path, header: Mapping[str, str], tensors: Iterable[str]) -> dict[str, Any]:
    """peft's LoraConfig, where the layout has one; empty where it has not."""
    if any(name.startswith("base_model.model.") for name in tensors):
        config = read_json(path.with_name(PEFT_CONFIG))
        if config is None:
            raise UserError(
                f"{path} is of peft, whose alpha is in {PEFT_CONFIG} beside it, and that cannot be read; copy both"
            )
        return config
    if CONFIG_KEY not in header:
        return {}
    try:
        values = json.loads(header[CONFIG_KEY])
        return {name.removeprefix("transformer."): value for name, value in values.items()}
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: {CONFIG_KEY} of its header is no JSON object ({error})"
        ) from error


def _sorted(where: str, tensors: Mapping[str, Tensor]) -> Parts:
    """The tensors by our modules' names and their parts. Raises UserError that names keys of no known layout."""
    parts, unknown = Parts(), list[str]()
    for key, tensor in tensors.items():
        prefix = _PREFIX.match(key)
        assert prefix is not None
        match = _KEY.fullmatch(key[prefix.end() :])
        module = None if match is None else _module(prefix[0], match["module"], match["diff_m"])
        if match is None or module is None:
            unknown.append(key)
            continue
        part = next(
            name
            for name in ("down", "up", "bias", "magnitude", "alpha", "diff", "diff_b", "diff_m")
            if match[name]
        )
        held = parts.setdefault(module, {})
        if part in held:
            raise UserError(
                f"{where} holds {key} beside another {part} of {module}; give a file of one adapter"
            )
        held[part] = tensor
    if unknown:
        raise UserError(
            f"{where} holds {len(unknown)} keys of {len(tensors)} that are not known: {_some(unknown)}; known are "
            f"{KNOWN}"
        )
    return parts


def _module(prefix: str, spelling: str, modulation: str | None) -> str | None:
    """Our name. Under diffusers' and peft's prefixes any name may be a module's: the model says whether it is."""
    if modulation is not None:
        return {"head": ""}.get(
            spelling, spelling if re.fullmatch(r"blocks\.\d+", spelling) else None
        )
    verbatim = spelling if prefix in ("transformer.", "base_model.model.") else None
    return our_name(spelling) or verbatim


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


# -- what it means --------------------------------------------------------------------------------


def _factors(
    where: str, module: str, held: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Factors:
    for part, other in (("down", "up"), ("up", "down")):
        if part not in held:
            raise UserError(
                f"{where} holds the {other} factor of {module} and no {part}; fetch it again"
            )
    down, up = (held[part].flatten(1) for part in ("down", "up"))
    rank = down.shape[0]
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != rank:
        raise UserError(
            f"{where}: the factors of {module} are {list(held['up'].shape)} and {list(held['down'].shape)}, which have "
            "no rank in common; fetch the file again"
        )
    magnitude = held.get("magnitude")
    if magnitude is not None:
        if magnitude.numel() != up.shape[0] or magnitude.shape[0] != up.shape[0]:
            raise UserError(
                f"{where}: the magnitude of {module} is {list(magnitude.shape)}; only DoRA with a length for each of "
                f"the {up.shape[0]} outputs is known"
            )
        magnitude = magnitude.flatten()
    return Factors(down, up, _scale(module, rank, held.get("alpha"), config), magnitude)


def _scale(module: str, rank: int, alpha: Tensor | None, config: Mapping[str, Any]) -> float:
    if alpha is not None:
        return float(alpha) / rank
    if not config:
        return 1.0
    by_config = _pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(by_config) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """peft's rule: the first pattern that the end of the module's name matches, else the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _differences(
    where: str, module: str, held: Mapping[str, Tensor], factors: Factors | None
) -> dict[str, Tensor]:
    """What is added to whole parameters of a module; a bias of `lora_B` has the factors' scale."""
    found = {
        f"{module}.{name}": held[part]
        for part, name in (("diff", "weight"), ("diff_b", "bias"))
        if part in held
    }
    if "diff_m" in held:
        found[f"{module}.scale_shift_table".removeprefix(".")] = held["diff_m"]
    if "bias" in held:
        if factors is None:
            raise UserError(
                f"{where} holds a bias of {module}'s factors and no factors; fetch it again"
            )
        found[f"{module}.bias"] = factors.scale * held["bias"]
    return found


def _completed(
    about: AdapterFacts, modules: Mapping[str, Factors], config: Mapping[str, Any]
) -> AdapterFacts:
    """With rank and alpha, where those are not known, of factors that all have the same."""
    rslora = about.rslora if about.rslora is not None else config.get("use_rslora")
    ranks = {factors.rank for factors in modules.values()}
    scales = {factors.scale for factors in modules.values()}
    if len(ranks) == 1 and len(scales) == 1:
        rank, scale = ranks.pop(), scales.pop()
        alpha = scale * (math.sqrt(rank) if rslora else rank)
        about = replace(about, rank=about.rank or rank, alpha=about.alpha or alpha)
    return replace(about, rslora=rslora)
