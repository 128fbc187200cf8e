"""An adapter in a model: peft wraps the layers and names the weights; the base is frozen in its compute dtype.

What peft lacks is here: first values keyed by name, dropout keyed by clip, masters in float32.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sora_train.config.sections.adapter import AdapterConfig
from sora_train.errors import ConfigError
from sora_train.models.adapters.dropout import ChannelDropout
from sora_train.models.adapters.targets import target_modules
from sora_train.models.transformer.layers import keyed_generator

NAME = "default"
BASE = ".base_layer."
DOWN, UP, MAGNITUDE = (
    f"lora_A.{NAME}.weight",
    f"lora_B.{NAME}.weight",
    f"lora_magnitude_vector.{NAME}.weight",
)


def add_adapter(model: nn.Module, cfg: AdapterConfig, dtype: torch.dtype) -> None:
    """Freeze `model` in `dtype` and put an adapter beside the layers that `cfg.targets` means in its `transformer`.

    The adapter's weights are float32 (float64 for a float64 `dtype`) and unfilled; see `first_values`.

    Raises:
        ConfigError: a target matches no layer, or the model has no `transformer`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    transformer = getattr(model, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise ConfigError(
            f"adapter.rank={cfg.rank} is for a model whose blocks are in its `transformer`, and {type(model).__name__} "
            "has none; set adapter.rank=0, or name the module so"
        )
    names = target_modules(transformer, cfg.targets)
    model.requires_grad_(False)
    lora = LoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha or cfg.rank,  # type: ignore[arg-type]  # peft divides by it and takes any number
        use_rslora=cfg.rslora,
        use_dora=cfg.dora,
        target_modules=names,
    )
    inject_adapter_in_model(lora, transformer)
    masters = torch.promote_types(dtype, torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        parameter.data = parameter.data.to(masters if is_adapter(name) else dtype)
    if cfg.dropout:
        for name in names:
            layer = transformer.get_submodule(name)
            width = layer.get_submodule(f"lora_A.{NAME}").in_features
            layer.lora_dropout[NAME] = ChannelDropout(cfg.dropout, width)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is the adapter's, not the base's."""
    return name.endswith((DOWN, UP, MAGNITUDE))


def base_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen base of a model with an adapter, by the names that it has without."""
    return {
        name.replace(BASE, "."): parameter
        for name, parameter in model.named_parameters()
        if not is_adapter(name)
    }


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's own parameters."""
    return {name: value for name, value in model.named_parameters() if is_adapter(name)}


def first_values(model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """First value of every factor of the adapter, float32 on the CPU at full shape: Kaiming-uniform going in, zero
    coming out (arXiv:2106.09685, section 4.1), so the first step computes what the base does.

    DoRA's lengths are not here: they are those of the base's rows.
    """
    for name, parameter in adapter_weights(model).items():
        if name.endswith(UP):
            yield name, torch.zeros(parameter.shape)
        elif name.endswith(DOWN):
            bound = 1.0 / math.sqrt(parameter.shape[1])
            values = torch.empty(parameter.shape)
            yield name, values.uniform_(-bound, bound, generator=keyed_generator(seed, name))


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes as if it had no adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    # Not enable_adapters(), which would also change what is trained.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def lengths_of_base(model: nn.Module) -> dict[str, nn.Module]:
    """Name of each of DoRA's vectors of lengths -> the base's layer of whose weight's rows they are; none without."""
    return {
        name: model.get_submodule(name.replace(MAGNITUDE, "base_layer"))
        for name in adapter_weights(model)
        if name.endswith(MAGNITUDE)
    }
