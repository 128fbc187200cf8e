"""A frozen linear layer whose weight is codes: widened when the layer computes, and again for its backward pass.

Neither the wide weight nor the layer's input is kept for backward, since the weight gets no gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sora_train.models.quantised.codes import dequantise, quantise, row_bytes
from sora_train.models.transformer.layers import Linear, work_dtype


def product(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """x W^T + b with W of codes, in the dtype of x."""
    weight, wide = dequantise(codes, scales, kind, x.dtype), work_dtype(x)
    offset = None if bias is None else bias.to(wide)
    return F.linear(x.to(wide), weight.to(wide), offset).to(x.dtype)


def product_back(dy: Tensor, codes: Tensor, scales: Tensor, kind: str) -> Tensor:
    """dy W, the gradient of the layer's input."""
    weight, wide = dequantise(codes, scales, kind, dy.dtype), work_dtype(dy)
    return (dy.to(wide) @ weight.to(wide)).to(dy.dtype)


class FrozenProduct(torch.autograd.Function):
    """`product`, whose backward pass is `product_back`."""

    @staticmethod
    def forward(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        return product(x, codes, scales, bias, kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, codes, scales, _, ctx.kind = inputs
        ctx.save_for_backward(codes, scales)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        codes, scales = ctx.saved_tensors
        return product_back(dy, codes, scales, ctx.kind), None, None, None, None


# For a compiler both passes are one step each: of a graph that it sees through it keeps the wide weight of every
# layer for backward, which is the whole model.
_PRODUCT = torch.library.custom_op("sora::frozen_product", product, mutates_args=())
_BACK = torch.library.custom_op("sora::frozen_product_back", product_back, mutates_args=())


@_PRODUCT.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@_BACK.register_fake
def _(dy: Tensor, codes: Tensor, scales: Tensor, kind: str) -> Tensor:
    inputs = codes.shape[1] * (2 if kind == "nf4" else 1)
    return dy.new_empty(*dy.shape[:-1], inputs)


def _differentiated(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    return _BACK(dy.contiguous(), *ctx.saved_tensors, ctx.kind), None, None, None, None


_PRODUCT.register_autograd(_differentiated, setup_context=FrozenProduct.setup_context)


class QuantisedLinear(nn.Module):
    """What a frozen `Linear` is replaced by.

    Attributes:
        codes, scales: frozen, uint8; see `codes.row_bytes`.
        compute_dtype: in which the layer multiplies.
    """

    def __init__(self, layer: nn.Linear, kind: str, dtype: torch.dtype):
        """`layer`'s bias is taken over; its weight is quantised, or, where it has no memory, only its shape."""
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind, self.compute_dtype = kind, dtype
        sizes = row_bytes(kind, layer.in_features)
        for name, size in zip(("codes", "scales"), sizes, strict=True):
            empty = layer.weight.new_empty(layer.out_features, size, dtype=torch.uint8)
            setattr(self, name, nn.Parameter(empty, requires_grad=False))
        self.bias = layer.bias
        if not layer.weight.is_meta:
            self.codes.data, self.scales.data = quantise(layer.weight, kind)

    @property
    def weight(self) -> Tensor:
        """The wide weight (out, in), made anew each time it is asked for."""
        with torch.no_grad():
            return dequantise(self.codes, self.scales, self.kind, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        run = _PRODUCT if torch.compiler.is_compiling() else FrozenProduct.apply
        y: Tensor = run(x.to(self.compute_dtype), self.codes, self.scales, self.bias, self.kind)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """The layers of codes, by the names of the layers that they stand for."""
    return {
        name.removesuffix(".base_layer"): layer
        for name, layer in model.named_modules()
        if isinstance(layer, QuantisedLinear)
    }


def quantise_base(model: nn.Module, kind: str, dtype: torch.dtype | None = None) -> None:
    """Replace every frozen `Linear` inside the blocks of `model` (or of its `transformer`), in place.

    An adapter's matrices are trained and stay, and so does all that is no matrix product. Layers without memory
    become codes without memory, to be filled row by row (`quantise`).

    Args:
        kind: `fp8`, `int8` or `nf4`; `compute` leaves the model as it is.
        dtype: in which the layers multiply; None: in that of their weights.
    """
    if kind == "compute":
        return
    blocks = getattr(model, "transformer", model).get_submodule("blocks")
    for parent in list(blocks.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is Linear and not layer.weight.requires_grad:
                quantised = QuantisedLinear(layer, kind, dtype or layer.weight.dtype)
                parent.register_module(name, quantised)
