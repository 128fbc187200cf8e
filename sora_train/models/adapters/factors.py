"""An adapter as numbers: two small matrices a module, and what they do to its weight.

Dimension key: r rank, in and out the module's widths.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The adapter of one linear module: W becomes W + scale * up @ down (Hu et al. 2021, arXiv:2106.09685, eq. 3).

    With a magnitude it is DoRA's (Liu et al. 2024, arXiv:2402.09353, eq. 5): each row of that sum is brought to the
    length that `magnitude` says.
    """

    down: Tensor
    """(r, in), `lora_A`."""
    up: Tensor
    """(out, r), `lora_B`."""
    scale: float
    """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    magnitude: Tensor | None = None
    """(out,), DoRA's lengths of rows; None for LoRA."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that this fits."""
        return self.up.shape[0], self.down.shape[1]

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """The adapted weight, in at least float32: (out, in), or a convolution's with as many values a row.

        `strength` multiplies the scale, as peft's `set_scale` does: 0 gives back the weight of LoRA's module, and of
        DoRA's its rows at the adapter's lengths.
        """
        dtype = torch.promote_types(weight.dtype, torch.promote_types(self.up.dtype, torch.float32))
        up, down = (factor.to(weight.device, dtype) for factor in (self.up, self.down))
        total = weight.to(dtype) + (strength * self.scale) * (up @ down).view(weight.shape)
        if self.magnitude is None:
            return total
        lengths = torch.linalg.vector_norm(total, dim=1, keepdim=True)
        return total * (self.magnitude.to(total)[:, None] / lengths)


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter says of itself; None or an empty string where that is not known."""

    rank: int | None = None
    alpha: float | None = None
    rslora: bool | None = None
    base_digest: str = ""
    """`checkpoint.layout.weights_digest` of the checkpoint it was trained on."""
    base: str = ""
    """What that is called."""
    trigger: str = ""
    """Words of the captions that call it up."""
    steps: int | None = None
    version: str = ""
    """Of the code that wrote it."""


@dataclass(frozen=True)
class AdapterWeights:
    """A whole adapter: factors by the module's name in the transformer, which is diffusers' (`blocks.0.attn1.to_q`)."""

    modules: Mapping[str, Factors]
    about: AdapterFacts = field(default_factory=AdapterFacts)
    differences: Mapping[str, Tensor] = field(default_factory=dict)
    """What is added to whole parameters, by their names: biases and norms in distilled models' files."""

    def adapted(self, name: str, value: Tensor, strength: float = 1.0) -> Tensor:
        """The parameter `name` as this adapter makes it of `value`, in at least float32; `value` where it has none."""
        factors = (
            self.modules.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        )
        if factors is not None:
            value = factors.merged(value, strength)
        if name in self.differences:
            dtype = torch.promote_types(value.dtype, torch.float32)
            value = value.to(dtype) + strength * self.differences[name].to(value.device, dtype)
        return value

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters that it changes; a weight's as a matrix."""
        weights = {f"{name}.weight": factors.shape for name, factors in self.modules.items()}
        return {**{name: tuple(one.shape) for name, one in self.differences.items()}, **weights}

    def without(self, names: Collection[str]) -> "AdapterWeights":
        """The same, but it leaves the parameters `names` as they are."""
        kept = {name: one for name, one in self.modules.items() if f"{name}.weight" not in names}
        added = {name: one for name, one in self.differences.items() if name not in names}
        return replace(self, modules=kept, differences=added)
