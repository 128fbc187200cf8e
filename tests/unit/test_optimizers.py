"""Muon, schedule-free AdamW and AdamW on 8-bit moments, each against its paper's equations in float64 and against an
implementation that is not ours."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sentences import refuses
from torch import Tensor, nn

from sora_train.config import OptimConfig
from sora_train.config.compose import compose
from sora_train.errors import ConfigError
from sora_train.parallel.degrees import Degrees
from sora_train.parallel.engine import check_engine
from sora_train.parallel.memory.moments import moments_of
from sora_train.training.optim.eight_bit import Code
from sora_train.training.optim.ema import Ema
from sora_train.training.optim.muon import (
    COEFFICIENTS,
    ITERATIONS,
    Muon,
    is_matrix,
    orthogonal,
    rows_of,
)
from sora_train.training.optim.optim import build_optimizer
from sora_train.training.optim.schedule_free import average_of

SHAPES = {
    "blocks.0.attn1.to_q.weight": (24, 24),
    "blocks.0.ffn.weight": (48, 24),
    "blocks.1.ffn.weight": (24, 48),
    "blocks.1.norm.weight": (24,),
    "patch_embedding.weight": (24, 4, 1, 2, 2),
    "proj_out.weight": (16, 24),
}


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(s, generator=draws, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()
    }


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value) for name, value in drawn(0, dtype).items()}


def step(
    optimizer: torch.optim.Optimizer, weights: dict[str, nn.Parameter], number: int, lr: float
) -> None:
    for name, grad in drawn(number, next(iter(weights.values())).dtype).items():
        weights[name].grad = grad
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.step()


# --- Muon ---


def newton_schulz(values: np.ndarray) -> np.ndarray:
    """What the iterations make of singular values: each by itself, by the polynomial's scalar form."""
    a, b, c = 3.4445, -4.7750, 2.0315
    s = values / np.sqrt((values**2).sum())
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return s


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.sampled_from([1e-12, 1.0, 1e9])
)
def test_singular_values_pass_the_polynomial_and_vectors_stay(
    rows: int, columns: int, seed: int, scale: float
) -> None:
    draws = np.random.default_rng(seed)
    matrix = draws.standard_normal((rows, columns)) * scale
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(torch.from_numpy(matrix)).numpy()
    np.testing.assert_allclose(found, (u * newton_schulz(s)) @ vt, atol=1e-9)
    assert (COEFFICIENTS, ITERATIONS) == ((3.4445, -4.7750, 2.0315), 5)


def test_matrices_at_once_are_each_as_alone_and_zeros_stay_zeros() -> None:
    many = torch.stack([drawn(n)["blocks.0.ffn.weight"] for n in range(3)])
    torch.testing.assert_close(orthogonal(many), torch.stack([orthogonal(one) for one in many]))
    assert not orthogonal(torch.zeros(3, 2)).any()


@given(st.integers(0, 40), st.integers(1, 9))
def test_rows_are_those_of_torch_chunk(rows: int, ranks: int) -> None:
    dealt = [len(part) for part in torch.arange(rows).chunk(ranks)] if rows else []
    wanted = dealt + [0] * (ranks - len(dealt))
    assert [part.stop - part.start for part in rows_of(rows, ranks)] == wanted


def test_muon_is_its_equations() -> None:
    cfg = OptimConfig(
        name="muon", momentum=0.8, weight_decay=0.1, eps=1e-6, lr_scales={"blocks.1.*": 3}
    )
    weights = parameters()
    expected = {name: value.numpy().copy() for name, value in drawn(0).items()}
    momenta = {
        name: np.zeros(math.prod(shape)).reshape(shape[0], -1) for name, shape in SHAPES.items()
    }
    optimizer = build_optimizer(cfg, weights, weights)
    first = np.zeros_like(expected["proj_out.weight"]), np.zeros_like(expected["proj_out.weight"])
    for number in range(1, 5):
        lr = 0.01 * number
        step(optimizer, weights, number, lr)
        for name, grad in drawn(number).items():
            rate = lr * (3 if name.startswith("blocks.1.") else 1)
            if not is_matrix(name, grad):
                continue
            g = grad.numpy().reshape(len(grad), -1)
            momenta[name] = 0.8 * momenta[name] + 0.2 * g
            u, s, vt = np.linalg.svd(0.8 * momenta[name] + 0.2 * g, full_matrices=False)
            o = 0.2 * math.sqrt(max(g.shape)) * (u * newton_schulz(s)) @ vt
            w = expected[name].reshape(len(grad), -1)
            expected[name] = (w - rate * (o + 0.1 * w)).reshape(grad.shape)
        # The head is AdamW's.
        g, (m, v) = drawn(number)["proj_out.weight"].numpy(), first
        first = m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        m_hat, v_hat = m / (1 - 0.9**number), v / (1 - 0.99**number)
        w = expected["proj_out.weight"]
        expected["proj_out.weight"] = w - lr * (m_hat / (np.sqrt(v_hat) + 1e-6) + 0.1 * w)
        for name in set(SHAPES) - {"blocks.1.norm.weight"}:
            np.testing.assert_allclose(weights[name].detach(), expected[name], rtol=1e-8, atol=1e-9)


def test_muon_is_that_of_torch_up_to_its_bfloat16() -> None:
    """torch.optim.Muon iterates in bfloat16, 2-D weights of one process only."""
    cfg = OptimConfig(name="muon", weight_decay=0.1)
    weights = parameters(torch.float32)
    names = [name for name, shape in SHAPES.items() if "blocks" in name and len(shape) == 2]
    theirs = {name: nn.Parameter(weights[name].detach().clone()) for name in names}
    peer = torch.optim.Muon(
        theirs.values(), lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    optimizer = build_optimizer(cfg, weights, weights)
    for number in range(1, 5):
        before = {name: weights[name].detach().clone() for name in names}
        for name in names:
            theirs[name].data.copy_(before[name])
            theirs[name].grad = drawn(number, torch.float32)[name]
        step(optimizer, weights, number, 0.02)
        peer.step()
        for name in names:
            ours, wanted = (of[name].detach() - before[name] for of in (weights, theirs))
            assert float((ours - wanted).norm() / wanted.norm()) < 0.02, (number, name)


def test_a_model_without_matrices_is_refused() -> None:
    layer = dict(nn.Linear(3, 3).named_parameters())
    with refuses(ConfigError, "optim.name=muon", "optim.name=adamw"):
        build_optimizer(OptimConfig(name="muon"), layer, layer)


def test_only_adapters_need_no_adamw() -> None:
    factors = {
        f"transformer.blocks.0.to_q.lora_{x}.default.weight": nn.Parameter(torch.ones(2, 2))
        for x in "AB"
    }
    found = build_optimizer(OptimConfig(name="muon"), factors, factors)
    assert isinstance(found, Muon) and found.rest is None


# --- schedule-free AdamW ---


def test_schedule_free_is_algorithm_1() -> None:
    """z, x and y of arXiv:2405.15682, algorithm 1, each kept for itself; the rates rise and one is out of order."""
    cfg = OptimConfig(name="schedule_free", betas=(0.7, 0.9), eps=1e-3, weight_decay=0.1)
    weights = parameters()
    optimizer = build_optimizer(cfg, weights, weights)
    module = nn.ParameterDict({name.replace(".", "/"): value for name, value in weights.items()})

    def state() -> dict[str, Tensor]:
        kept = {name: moments_of(optimizer, value)["ahead"] for name, value in weights.items()}
        return {f"{name.replace('.', '/')}.ahead": value for name, value in kept.items()}

    z = {name: value.numpy().copy() for name, value in drawn(0).items()}
    x, y = dict(z), dict(z)
    v, squares = {name: 0.0 for name in z}, 0.0
    for number, lr in enumerate((0.01, 0.05, 0.03, 0.03), 1):
        step(optimizer, weights, number, lr)
        gamma = lr * math.sqrt(1 - 0.9**number)
        squares += gamma**2
        c = gamma**2 / squares
        for name, grad in drawn(number).items():
            g, decay = grad.numpy(), 0.1 if grad.ndim > 1 else 0.0
            v[name] = 0.9 * v[name] + 0.1 * g * g
            z[name] = z[name] - gamma * (g / (np.sqrt(v[name]) + 1e-3) + decay * y[name])
            x[name] = (1 - c) * x[name] + c * z[name]
            y[name] = 0.3 * z[name] + 0.7 * x[name]
            np.testing.assert_allclose(weights[name].detach(), y[name], rtol=1e-9, atol=1e-12)
        ema = Ema(module, 0.99, (0.5,), own=average_of(cfg, state()))
        ema.update(number)
        for name, average in x.items():
            np.testing.assert_allclose(
                ema.shadow[name.replace(".", "/")], average, rtol=1e-9, atol=1e-12
            )


# --- 8-bit moments ---


@pytest.mark.parametrize("signed", [True, False])
def test_int8_is_torchaos_and_fp8_is_torchs(signed: bool) -> None:
    from torchao.optim.quant_utils import (
        create_dynamic_map,
        dequant_with_qmap,
        quantize_8bit_with_qmap,
        scale_tensor,
    )
    from torchao.optim.subclass_fp8 import quantize_fp8

    values = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) ** 3
    values = values if signed else values.square()
    table = torch.tensor(create_dynamic_map(signed))
    unit, scales = scale_tensor(values, 256)
    theirs = quantize_8bit_with_qmap(unit, table)
    wanted = dequant_with_qmap(theirs, table, scales)
    code = Code("int8", signed, torch.device("cpu"))
    torch.testing.assert_close(code.numbers, table, rtol=1e-6, atol=0.0)
    codes, own_scales = code.encode(values)
    torch.testing.assert_close(own_scales.flatten(), scales)
    kept = (theirs != 0) | torch.tensor(signed)
    assert float((codes == theirs)[kept].float().mean()) > 0.999
    found = code.decode(codes, own_scales)
    # A value in the middle of two numbers may go to either.
    assert (
        float(((found - values).abs() - (wanted - values).abs())[kept].max()) < 1e-6 * scales.max()
    )
    theirs, scales = quantize_fp8(values, 256)
    codes, _ = Code("fp8", signed, torch.device("cpu")).encode(values)
    kept = (theirs.float() != 0) | torch.tensor(signed)
    assert float((codes == theirs.view(torch.uint8))[kept].float().mean()) > 0.999


@settings(deadline=None)
@given(
    st.sampled_from(["int8", "fp8"]),
    st.booleans(),
    st.integers(1, 3),
    st.integers(1, 600),
    st.floats(-20, 3),
)
def test_decoding_is_near_and_never_loses_a_second_moment(
    kind: str, signed: bool, rows: int, width: int, power: float
) -> None:
    draws = torch.Generator().manual_seed(width)
    values = torch.randn(rows, width, generator=draws, dtype=torch.float64) * 10**power
    values = values if signed else values.square()
    code = Code(kind, signed, torch.device("cpu"))
    codes, scales = code.encode(values)
    assert codes.dtype == torch.uint8 and codes.shape == values.shape
    assert scales.shape == (rows, -(-width // 256))
    found = code.decode(codes, scales)
    largest = scales.repeat_interleave(256, dim=1)[:, :width]
    # Steps of the table near 1 are a 64th to an 18th of a value, and near 0 a fixed part of the largest.
    assert ((found - values).abs() <= 0.07 * values.abs() + 0.002 * largest).all()
    assert signed or (found > 0)[values > 0].all()


@pytest.mark.parametrize(("kind", "allowed"), [("int8", 0.03), ("fp8", 0.06)])
def test_eight_bit_moments_follow_those_of_torchao_and_float32(kind: str, allowed: float) -> None:
    """Where no row is cut torchao's block is ours; its update is taken without the compiler."""
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit
    from torchao.optim.subclass_fp8 import OptimStateFp8

    draws = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(16, 256, generator=draws))
    small = nn.Parameter(torch.randn(15, 256, generator=draws))
    named = {"a": weight, "b": small}
    cfg = OptimConfig(state=kind, eps=1e-6, weight_decay=0.1)
    optimizer = build_optimizer(cfg, named, named)
    theirs, plain = weight.detach().clone(), nn.Parameter(weight.detach().clone())
    plain_small = nn.Parameter(small.detach().clone())
    reference = torch.optim.AdamW(
        [plain, plain_small], lr=0.01, betas=cfg.betas, eps=1e-6, weight_decay=0.1
    )
    new = OptimState8bit if kind == "int8" else OptimStateFp8
    signs = ({"signed": True}, {"signed": False}) if kind == "int8" else ({}, {})
    moments = [new.zeros((16, 256), **sign, dtype=torch.float32) for sign in signs]
    for number in range(1, 9):
        for parameter in (weight, small):
            parameter.grad = torch.randn(parameter.shape, generator=draws)
        plain.grad, plain_small.grad = weight.grad, small.grad
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        before = weight.detach().clone()
        optimizer.step()
        reference.step()
        single_param_adam(
            theirs, weight.grad, torch.tensor(float(number)), *moments, None, torch.tensor(0.01), *cfg.betas, 0.1,
            1e-6, True, False,
        )  # fmt: skip
        moved = (weight - before).norm()
        assert float((weight - theirs).norm() / moved) < 0.002
    assert 1e-4 < float((weight - plain).norm() / (plain - drawn_first(weight)).norm()) < allowed
    # Few values keep float32 moments.
    torch.testing.assert_close(small, plain_small)
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32


def drawn_first(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0))


# --- what does not fit together ---


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "schedule_free", "decay": "linear"}, "optim.decay=constant"),
        ({"name": "schedule_free", "betas": (0.0, 0.9)}, "above 0"),
        ({"name": "muon", "state": "int8"}, "optim.state=float32"),
    ],
)
def test_keys_that_contradict_each_other(settings: dict, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        OptimConfig(**settings)


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["optim.name=muon", "parallel=zero2"], ("parallel.engine=zero2", "parallel.engine=fsdp")),
        (["optim.state=fp8", "parallel=zero3"], ("parallel.engine=zero3", "optim.state=float32")),
        (
            ["optim.name=muon", "parallel.offload_optimizer=true"],
            ("parallel.offload_optimizer=true", "adamw"),
        ),
        (
            ["optim.name=schedule_free", "parallel.offload_optimizer=true"],
            ("schedule_free", "adamw"),
        ),
        (["optim.state=int8", "parallel.offload_optimizer=true"], ("int8", "optim.state=float32")),
    ],
)
def test_what_an_engine_cannot_do_is_refused(overrides: list[str], facts: tuple[str, ...]) -> None:
    cfg = compose(["experiment=parity_tiny", "optim=adamw", *overrides]).config
    with refuses(ConfigError, *facts):
        check_engine(cfg, Degrees(1, 1, 1, 1), torch.float32)
