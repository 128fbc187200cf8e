"""Products in float8: the rounding as its paper has it, all products of a block and no others, refusals."""

from collections import Counter
from typing import Any

import pytest
import torch
from sentences import refuses
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.config.sections.model import ModelConfig
from sora_train.errors import ConfigError
from sora_train.models.transformer.dit import VideoDiT
from sora_train.models.transformer.layers import Linear
from sora_train.parallel.compile import compile_blocks, graphs_compiled
from sora_train.parallel.memory import float8 as float8_module
from sora_train.parallel.memory.activations import checkpoint_blocks, chunk_mlps
from sora_train.parallel.memory.float8 import check_float8, multiply_in_float8

pytestmark = pytest.mark.skipif(not float8_module.is_installed(), reason="needs the extra float8")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = dict(num_layers=2, num_heads=2, head_dim=16, ffn_dim=96, in_channels=4, text_dim=8)
LINEAR_LAYERS = 10
"""Of a block: four of each attention, two of the MLP."""


def build(float8: bool = True, **sizes: Any) -> VideoDiT:
    model = VideoDiT(ModelConfig(attention="math", **(SIZES | sizes)))
    model.init_weights(0)
    nn.init.normal_(model.proj_out.weight, generator=torch.Generator().manual_seed(1))
    model = model.bfloat16()
    if float8:
        multiply_in_float8(model)
    return model


def step(model: VideoDiT, rows: int = 6) -> list[Tensor]:
    """2 clips of 3 x (rows / 2) x 5 tokens: no multiple of 16."""
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 3, rows, 10, generator=draws)
    captions = torch.randn(2, 7, 8, generator=draws)
    t_BT = torch.rand(2, 3, generator=draws)
    model.zero_grad(set_to_none=True)
    velocity = model(latents, t_BT, captions)
    velocity.square().sum().backward()
    return [velocity.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def rounded(x: Tensor, dim: int) -> Tensor:
    """`x` as e4m3 holds it (3 bits of mantissa, exponents from -6, most 448), each line along `dim` scaled by the
    power of two below 448 / its largest value; in float64 and by hand."""
    x = x.double()
    scale = torch.exp2(torch.floor(torch.log2(448 / x.abs().amax(dim, keepdim=True))))
    exponent = torch.frexp((x * scale).abs())[1] - 1
    unit = torch.exp2(exponent.clamp(min=-6).double() - 3)
    return torch.round(x * scale / unit) * unit / scale


def test_a_layer_multiplies_what_e4m3_holds_of_rows_forward_and_backward():
    draws = torch.Generator().manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Sequential(Linear(48, 32).bfloat16())])
    multiply_in_float8(model)
    layer = model.blocks[0][0]
    x = (torch.randn(2, 21, 48, generator=draws) * 3).bfloat16().requires_grad_()
    dy = torch.randn(2, 21, 32, generator=draws).bfloat16() / 50
    y = layer(x)
    y.backward(dy)
    assert torch.equal(layer(x.detach().float()), y), "as `Linear`, in the dtype of its weight"
    w = layer.weight.detach()
    expected = {
        "y": rounded(x.detach(), -1) @ rounded(w, 1).T + layer.bias.detach().double(),
        "dx": rounded(dy, -1) @ rounded(w, 0),
        "dw": rounded(dy.flatten(0, 1), 0).T @ rounded(x.detach().flatten(0, 1), 0),
    }
    plain = {"y": nn.functional.linear(x, w, layer.bias), "dx": dy @ w}
    for name, found in (("y", y), ("dx", x.grad), ("dw", layer.weight.grad)):
        scale = expected[name].abs().max()
        torch.testing.assert_close(
            found.double() / scale, expected[name] / scale, rtol=8e-3, atol=4e-3
        )
        if name in plain:
            assert (plain[name].double() - expected[name]).norm() > 0.01 * expected[name].norm()


class Products(TorchDispatchMode):
    """Counts the operators that multiply matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0].removeprefix("aten::")
        narrow = any(type(arg).__name__.startswith("Float8") for arg in args)
        if name in ("mm", "addmm", "_scaled_mm"):
            self.seen["float8" if narrow or name == "_scaled_mm" else "wide"] += 1
        return func(*args, **(kwargs or {}))


def test_every_product_of_a_block_is_in_float8_and_no_other_is():
    """A layer that a block multiplies by in some other way than by calling it would stay wide."""
    counts = []
    for layers in (1, 2):
        with Products() as products:
            step(build(num_layers=layers))
        counts.append(products.seen)
    assert counts[1]["wide"] == counts[0]["wide"] > 0
    # A product and two for gradients.
    assert counts[1]["float8"] - counts[0]["float8"] == 3 * LINEAR_LAYERS
    assert counts[0]["float8"] == 3 * LINEAR_LAYERS


def test_parameters_stay_the_same_by_name_and_object():
    plain = build(float8=False)
    before = dict(plain.named_parameters())
    multiply_in_float8(plain)
    after = dict(plain.named_parameters())
    assert list(before) == list(after) and all(after[name] is before[name] for name in before)


def test_the_model_stays_near_its_bfloat16_self():
    for found, expected in zip(step(build()), step(build(float8=False)), strict=True):
        if expected.norm() > 1e-2:
            assert 0 < (found - expected).float().norm() < 0.3 * expected.float().norm()


def test_checkpoints_and_parts_of_the_mlp_multiply_in_float8_too():
    expected = step(build())
    for mode in ("full", "selective"):
        model = build()
        checkpoint_blocks(model, mode)
        assert all(map(torch.equal, step(model), expected)), mode
    with Products() as products:
        model = build()
        chunk_mlps(model, 3)
        step(model)
    # Each part's two products once more in backward.
    assert products.seen["float8"] == SIZES["num_layers"] * (3 * 8 + 4 * 2 * 3)


@pytest.mark.slow
def test_blocks_compile_to_one_graph_for_all_sizes(monkeypatch: pytest.MonkeyPatch):
    """Traced as the code generator has it, and run as it is."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, backend="aot_eager", **k))
    torch._dynamo.reset()
    eager, model = build(), build()
    recompiles = compile_blocks(model, "dynamic")
    before = graphs_compiled()
    for rows in (6, 8):
        for found, expected in zip(step(model, rows), step(eager, rows), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * expected.abs().max())
    assert graphs_compiled() - before == 1 and recompiles is not None and recompiles.count == 0
    torch._dynamo.reset()


def wanting(*overrides: str) -> Config:
    return compose(["experiment=parity_tiny", "model.float8=rowwise", *overrides]).config


def test_what_float8_needs_is_told_at_start(monkeypatch: pytest.MonkeyPatch):
    check_float8(wanting(), torch.bfloat16, CPU)
    check_float8(wanting("model.float8=off"), torch.float32, CPU)
    with refuses(ConfigError, "model.float8=rowwise", "float32", "parallel.param_dtype=bfloat16"):
        check_float8(wanting(), torch.float32, CPU)
    with refuses(ConfigError, "model.float8=rowwise", "ffn_dim", "100", "multiples of 16"):
        check_float8(wanting("model.ffn_dim=100"), torch.bfloat16, CPU)
    with refuses(ConfigError, "model.float8=rowwise", "parallel.engine=zero3", "zero2"):
        check_float8(wanting("parallel=zero3"), torch.bfloat16, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with refuses(ConfigError, "model.float8=rowwise", "8.9", "NVIDIA A100"):
        check_float8(wanting(), torch.bfloat16, CUDA)
    monkeypatch.setattr(float8_module, "is_installed", lambda: False)
    with refuses(ConfigError, "sora_train[float8]", "model.float8=off"):
        check_float8(wanting(), torch.bfloat16, CPU)


def test_a_model_without_such_layers_is_refused():
    with refuses(ConfigError, "model.float8", "Sequential"):
        multiply_in_float8(nn.Sequential(nn.Linear(16, 16)))
