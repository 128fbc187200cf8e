"""Frozen weights as codes: known bounds of error, torchao's codes bit for bit, gradients of the dense layer, and rows
that can be quantised apart.
"""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sora_train.config import ModelConfig
from sora_train.models.quantised.codes import GROUP, KINDS, NF4, dequantise, quantise, row_bytes
from sora_train.models.quantised.linear import QuantisedLinear, quantise_base
from sora_train.models.transformer.dit import VideoDiT
from sora_train.models.transformer.layers import Linear, linear

CFG = ModelConfig(
    num_layers=2,
    num_heads=2,
    head_dim=32,
    ffn_dim=128,
    in_channels=4,
    text_dim=16,
    attention="math",
)


def matrix(rows: int = 24, columns: int = 192, seed: int = 0) -> torch.Tensor:
    """Rows of very different size."""
    draws = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-4, 2, rows)[:, None]
    return torch.randn(rows, columns, generator=draws) * sizes


def back(weight: torch.Tensor, kind: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return dequantise(*quantise(weight, kind), kind, dtype)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_errors_stay_within_what_the_format_says(seed: int, size: float) -> None:
    weight = matrix(6, 128, seed) * size
    exact, largest = weight.double(), weight.double().abs().amax(1, keepdim=True)
    # int8: half a scale, 127.5 of which are the largest of the row.
    assert ((back(weight, "int8") - exact).abs() <= largest / 127.5 / 2 * (1 + 1e-4)).all()
    # e4m3: three bits of fraction, so 2^-4 of the value; 2^-10 of the scale where values are subnormal.
    off = (back(weight, "fp8") - exact).abs()
    assert (off <= torch.maximum(exact.abs() * 2**-4, largest / 448 * 2**-10) * (1 + 1e-4)).all()
    # nf4: half the widest gap between two of its values, of the group's largest.
    widest = max(b - a for a, b in zip(NF4, NF4[1:], strict=False))
    off = (back(weight, "nf4") - exact).abs().unflatten(1, (-1, GROUP))
    bound = exact.abs().unflatten(1, (-1, GROUP)).amax(2, keepdim=True) * widest / 2
    assert (off <= bound * (1 + 1e-4)).all()


def test_nf4_takes_the_nearest_of_its_values() -> None:
    weight = matrix(4, 128)
    scale = weight.unflatten(1, (-1, GROUP)).abs().amax(2, keepdim=True)
    values = weight.unflatten(1, (-1, GROUP)) / scale
    nearest = torch.tensor(NF4)[(values.unsqueeze(3) - torch.tensor(NF4)).abs().argmin(3)]
    assert torch.equal(back(weight, "nf4", torch.float32), (nearest * scale).flatten(1))


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_what_the_codes_can_say_comes_back(kind: str) -> None:
    weight = back(matrix(), kind, torch.float32)
    assert torch.allclose(back(weight, kind, torch.float32), weight, rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_come_back(kind: str) -> None:
    zeros = torch.zeros(3, 64)
    assert torch.equal(back(zeros, kind, torch.float32), zeros)


def test_codes_are_those_of_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    logging.getLogger("torchao").setLevel(logging.ERROR)
    quantization = pytest.importorskip("torchao.quantization")
    weight = matrix()
    for kind, config in (
        ("int8", quantization.Int8WeightOnlyConfig(version=2)),
        ("fp8", quantization.Float8WeightOnlyConfig()),
    ):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        quantization.quantize_(layer, config)
        codes, scales = quantise(weight, kind)
        theirs = layer.weight
        assert torch.equal(codes, theirs.qdata.view(torch.uint8)), kind
        assert torch.equal(scales.view(torch.float32), theirs.scale.view(-1, 1)), kind
    # It rounds the paper's 16 values to four digits.
    theirs = quantization.to_nf4(weight, GROUP, 9)
    assert torch.allclose(theirs.nf4, torch.tensor(NF4), atol=5.1e-5)
    monkeypatch.setattr("sora_train.models.quantised.codes.NF4", theirs.nf4.tolist())
    assert torch.equal(quantise(weight, "nf4")[0].flatten(), theirs.quantized_data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_part_of_the_rows_has_the_codes_that_it_has_in_the_whole(
    kind: str, dtype: torch.dtype
) -> None:
    weight = matrix().to(dtype)
    codes, scales = quantise(weight, kind)
    assert (codes.shape[1], scales.shape[1]) == row_bytes(kind, weight.shape[1])
    assert codes.dtype == scales.dtype == torch.uint8
    for rows in (slice(0, 7), slice(7, 24)):
        mine = quantise(weight[rows], kind)
        assert torch.equal(mine[0], codes[rows]) and torch.equal(mine[1], scales[rows])


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_what_the_dense_one_of_its_weight_does(kind: str) -> None:
    layer = Linear(64, 32).double().requires_grad_(False)
    mine = QuantisedLinear(layer, kind, torch.float64)
    x = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    y, theirs = mine(x), linear(twin, mine.weight, layer.bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    theirs.backward(dy)
    assert torch.equal(y, theirs)
    assert torch.allclose(x.grad, twin.grad, rtol=1e-12)
    assert torch.autograd.gradcheck(mine, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_codes_and_nothing_wide(kind: str) -> None:
    mine = QuantisedLinear(Linear(256, 128).requires_grad_(False), kind, torch.float32)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mine(torch.randn(8, 256, requires_grad=True))
    assert {each.data_ptr() for each in kept} == {mine.codes.data_ptr(), mine.scales.data_ptr()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_graph_keeps_no_wide_weight(kind: str) -> None:
    """With what partitions graphs for real; a graph that sees through the widening keeps it for backward."""
    layers = nn.Sequential(
        QuantisedLinear(Linear(256, 512).requires_grad_(False), kind, torch.float32),
        nn.GELU(),
        QuantisedLinear(Linear(512, 256).requires_grad_(False), kind, torch.float32),
    )
    x = torch.randn(8, 256, requires_grad=True)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager_decomp_partition")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = compiled(x)
    assert all(each.dtype == torch.uint8 or each.shape[0] == 8 for each in kept)
    mine, theirs = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, layers(x)))
    assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_blocks_are_quantised_and_nothing_else_is() -> None:
    model = VideoDiT(CFG)
    model.init_weights(0)
    model.requires_grad_(False)
    model.blocks[1].ffn.net[2].requires_grad_(True)
    before = {name: value.clone() for name, value in model.named_parameters()}
    quantise_base(model, "int8")
    after = dict(model.named_parameters())
    matrices = [
        name for name, value in before.items() if name.startswith("blocks") and value.ndim == 2
    ]
    for name, value in before.items():
        if name in matrices and name != "blocks.1.ffn.net.2.weight":
            stem = name.removesuffix("weight")
            assert name not in after
            assert after[f"{stem}codes"].shape == value.shape
            assert not after[f"{stem}codes"].requires_grad
        else:
            assert torch.equal(after[name], value), name
    assert after["blocks.1.ffn.net.2.weight"].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_codes_is_the_model_of_their_weights(kind: str) -> None:
    """Loss and gradient of a trained matrix, in float64, against the dense model with the widened weights."""
    mine = VideoDiT(CFG)
    mine.init_weights(0)
    mine.double().requires_grad_(False)
    nn.init.normal_(mine.proj_out.weight, std=0.1)
    dense = VideoDiT(CFG).double().requires_grad_(False)
    dense.load_state_dict(mine.state_dict())
    mine.blocks[0].attn1.to_q.requires_grad_(True)
    dense.blocks[0].attn1.to_q.requires_grad_(True)
    quantise_base(mine, kind)
    layers = dict(mine.named_modules())
    for name, parameter in dense.named_parameters():
        owner = layers[name.rpartition(".")[0]]
        if isinstance(owner, QuantisedLinear) and name.endswith(".weight"):
            parameter.data = owner.weight
    latents = torch.randn(1, 4, 2, 4, 4, dtype=torch.float64)
    inputs = latents, torch.rand(1, 2).double(), torch.randn(1, 5, 16, dtype=torch.float64)
    for model in (mine, dense):
        model(*inputs).square().mean().backward()
    grads = [model.blocks[0].attn1.to_q.weight.grad for model in (mine, dense)]
    assert grads[0].abs().max() > 1e-8
    assert torch.allclose(*grads, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_without_memory_become_codes_without_memory(kind: str) -> None:
    with torch.device("meta"):
        model = VideoDiT(CFG).requires_grad_(False)
    quantise_base(model, kind, torch.bfloat16)
    layer = model.blocks[0].ffn.net[2]
    assert isinstance(layer, QuantisedLinear) and layer.codes.is_meta
    assert (
        layer.codes.shape == (64, row_bytes(kind, 128)[0]) and layer.compute_dtype == torch.bfloat16
    )
