"""How many values a model with an adapter trains, and what its frozen base holds, from shapes alone."""

import functools
from dataclasses import dataclass

import torch

from sora_train.config import Config
from sora_train.config.sections.adapter import AdapterConfig
from sora_train.config.sections.model import ModelConfig
from sora_train.models.adapters.targets import target_modules
from sora_train.models.quantised.codes import row_bytes
from sora_train.models.transformer.dit import VideoDiT
from sora_train.models.transformer.layers import Linear

Shape = tuple[int, int]
"""Outputs and inputs of a linear layer."""


@dataclass(frozen=True)
class FrozenSizes:
    """Of one model and one adapter."""

    trained: int
    """Values of the adapter."""
    matrices: tuple[Shape, ...]
    """Linear layers of one block."""
    blocks: int
    rest: int
    """Frozen values that are no matrix of a block."""
    attention: bool
    """Whether the adapter stands beside a layer of attention."""
    mlp: bool
    """Whether it stands beside the MLP."""
    ranks: int
    """Sum of the ranks of the adapters of one block."""

    def block_bytes(self, base: str, w: int) -> int:
        """One block's matrices as `memory.base` keeps them, `w` bytes a value in the compute precision."""
        if base == "compute":
            return sum(out * inputs for out, inputs in self.matrices) * w
        return sum(out * sum(row_bytes(base, inputs)) for out, inputs in self.matrices)

    def widened_bytes(self, base: str, w: int) -> int:
        """What widening the largest matrix takes while its layer computes."""
        if base == "compute":
            return 0
        # nf4 has a number of 4 bytes for each pair of values beside them.
        each = w + (2 if base == "nf4" else 0)
        return max(out * inputs for out, inputs in self.matrices) * each

    def resident_bytes(self, base: str, swapped: int, w: int) -> int:
        """The frozen base on the device of a single rank: swapped blocks are there two at a time."""
        there = self.blocks - swapped + min(2, swapped)
        return there * self.block_bytes(base, w) + self.rest * w


def frozen_sizes(cfg: Config) -> FrozenSizes:
    """Raises ConfigError where a target of the adapter matches no layer."""
    return _sizes(cfg.model.model_dump_json(), cfg.adapter.model_dump_json())


@functools.cache
def _sizes(model: str, adapter: str) -> FrozenSizes:
    cfg, wanted = ModelConfig.model_validate_json(model), AdapterConfig.model_validate_json(adapter)
    with torch.device("meta"):
        transformer = VideoDiT(cfg)
    names = target_modules(transformer, wanted.targets)
    shapes = {
        name: (layer.out_features, layer.in_features)
        for name, layer in transformer.named_modules()
        if isinstance(layer, Linear)
    }
    first = [shape for name, shape in shapes.items() if name.startswith("blocks.0.")]
    beside = [name for name in names if name.startswith("blocks.0.")]
    values = sum(parameter.numel() for parameter in transformer.parameters())
    return FrozenSizes(
        trained=sum(
            wanted.rank * sum(shapes[name]) + (shapes[name][0] if wanted.dora else 0)
            for name in names
        ),
        matrices=tuple(first),
        blocks=cfg.num_layers,
        rest=values - cfg.num_layers * sum(out * inputs for out, inputs in first),
        attention=any(".attn" in name for name in beside),
        mlp=any(".ffn." in name for name in beside),
        ranks=wanted.rank * len(beside),
    )
