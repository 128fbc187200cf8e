"""Attention kernels: each computes softmax(QK)V, its gradients and its key mask; what is missing is told."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses, says
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import _registry

from sora_train.config.sections.model import ModelConfig
from sora_train.errors import ConfigError
from sora_train.models.transformer import attention_backends, attention_gemm, layers
from sora_train.models.transformer.attention import AttentionCore
from sora_train.models.transformer.attention_backends import (
    BACKENDS,
    describe,
    missing,
    prepare_attention,
    resolve,
    varlen_attention,
)
from sora_train.models.transformer.attention_gemm import gemm_attention
from sora_train.models.transformer.cpu_kernels import Kernels, using
from sora_train.models.transformer.layers import WideLinear
from sora_train.parallel.memory.activations import ATTENTION
from sora_train.runtime.world import set_determinism

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ON_CPU = [name for name in BACKENDS if missing(name, CPU, torch.float32) is None]


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The definition, in float64, on (B, L, N, K)."""
    scores = torch.einsum("blnk,bsnk->bnls", q.double(), k.double()) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return torch.einsum("bnls,bsnk->blnk", scores.softmax(-1), v.double())


def qkv(length: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    return [
        draw(i, 2, n, 3, 16).to(dtype).requires_grad_() for i, n in enumerate((length, keys, keys))
    ]


def test_what_a_cpu_can_run_is_run_here():
    assert set(ON_CPU) == {"auto", "sdpa", "flash", "math", "gemm"}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 4e-2)],
    ids=str,
)
@pytest.mark.parametrize("backend", ON_CPU)
def test_kernel_and_its_gradients_are_those_of_the_definition(
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    masked: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    # Several tiles, which are not full, and some of the heads at a time.
    monkeypatch.setattr(attention_gemm, "TILE", 4)
    monkeypatch.setattr(attention_gemm, "MAX_SCORES", 5 * 4 * 4)
    inputs = qkv(10, 7, dtype)
    mask = torch.tensor([[True] * 7, [True, False, True, False, False, True, True]])
    mask = mask if masked else None
    cotangent = draw(3, 2, 10, 3, 16)
    found = AttentionCore(backend)(*inputs, mask)
    assert found.dtype == dtype
    wanted = exact(*inputs, mask)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad((found.double() * cotangent).sum(), inputs)
    expected = torch.autograd.grad((wanted * cotangent).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=2 * tolerance)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 200), st.booleans())
@settings(deadline=None, max_examples=20)
def test_gemm_does_not_depend_on_its_tiles(
    length: int, keys: int, tile: int, scores: int, masked: bool
):
    inputs = [draw(i, 2, 3, n, 4).requires_grad_() for i, n in enumerate((length, keys, keys))]
    bias = torch.zeros(2, 1, 1, keys)
    bias[1, ..., keys // 2 + 1 :] = float("-inf") if masked else 0

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(gemm_attention(*inputs, bias).square().sum(), inputs)

    whole = gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_gemm, "TILE", tile)
        patch.setattr(attention_gemm, "MAX_SCORES", scores)
        found = gradients()
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gemm_is_nearly_as_precise_as_pytorch_in_bfloat16():
    """Diffuse attention, as a run begins with, and attention that rests on a few keys. Without its shift of logarithms
    the first would be three times as far off as PyTorch's; with twice the shift the second."""
    for sharpness in (1.0, 4.0):
        inputs = [draw(i, 1, 2, 1024, 64).bfloat16() for i in range(3)]
        inputs[0] *= sharpness
        cotangent = draw(3, 1, 2, 1024, 64)

        def gradients(kernel, dtype: torch.dtype) -> list[Tensor]:  # noqa: ANN001
            leaves = [x.to(dtype).requires_grad_() for x in inputs]  # noqa: B023
            found = torch.autograd.grad(kernel(*leaves), leaves, cotangent.to(dtype))  # noqa: B023
            return [x.double() for x in found]

        exactly = gradients(F.scaled_dot_product_attention, torch.float64)

        def off(kernel) -> list[float]:  # noqa: ANN001
            found = gradients(kernel, torch.bfloat16)
            return [float((a - b).norm() / b.norm()) for a, b in zip(found, exactly, strict=True)]  # noqa: B023

        for mine, theirs in zip(
            off(gemm_attention), off(F.scaled_dot_product_attention), strict=True
        ):
            assert mine < 2.2 * theirs < 0.02


@pytest.mark.parametrize("wide", [False, True])
def test_gradients_of_gemm_pass_gradcheck(wide: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention_gemm, "TILE", 4)
    q, k, v = (draw(i, 2, n, 2, 4).transpose(1, 2) for i, n in enumerate((5, 6, 6)))
    bias = torch.zeros(2, 1, 1, 6)
    bias[0, ..., 4:] = float("-inf")
    inputs = [x.contiguous().requires_grad_() if wide else x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: gemm_attention(*x, bias), inputs)


def test_custom_operators_of_gemm_are_sound():
    inputs = [x.detach().transpose(1, 2).requires_grad_() for x in qkv(6, 5, torch.float64)]
    tests = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(torch.ops.sora.gemm_attention.default, (*inputs, None), test_utils=tests)


def test_gemm_keeps_no_scores_for_backward():
    def saved(length: int) -> int:
        sizes: list[int] = []
        q, k, v = (draw(i, 1, 2, length, 8, dtype=torch.float32).requires_grad_() for i in range(3))
        with saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            gemm_attention(q, k, v)
        return sum(sizes)

    assert saved(64) == 2 * saved(32) == 2 * 64 * (4 * 8 + 1)


def test_auto_takes_what_was_chosen_for_bfloat16_on_a_cpu_and_for_nothing_else():
    with using(Kernels("gemm")):
        assert resolve("auto", CPU, torch.bfloat16) == ("gemm", torch.bfloat16)
        assert resolve("auto", CPU, torch.float32) == ("sdpa", torch.float32)
        assert resolve("auto", GPU, torch.bfloat16) == ("sdpa", torch.bfloat16)
        assert resolve("sdpa", CPU, torch.bfloat16) == ("sdpa", torch.bfloat16)
    with using(Kernels(attention_in_float32=True)):
        assert resolve("auto", CPU, torch.bfloat16) == ("sdpa", torch.float32)


@pytest.mark.parametrize("bias", [True, False])
def test_a_wide_linear_layer_is_a_linear_layer(bias: bool):
    x, weight = draw(0, 2, 3, 4).requires_grad_(), draw(1, 5, 4).requires_grad_()
    b = draw(2, 5).requires_grad_() if bias else None
    assert torch.equal(WideLinear.apply(x, weight, b), F.linear(x, weight, b))
    assert torch.autograd.gradcheck(WideLinear.apply, (x, weight, b))

    narrow = [None if a is None else a.detach().bfloat16().requires_grad_() for a in (x, weight, b)]
    with using(Kernels(linear_in_float32=True)):
        y = layers.linear(*narrow)
    assert y.dtype == torch.bfloat16 and "WideLinear" in type(y.grad_fn).__name__
    exactly = F.linear(*(None if a is None else a.detach().double() for a in narrow))
    torch.testing.assert_close(y.double(), exactly, rtol=2**-8, atol=2**-8)
    assert "WideLinear" not in type(layers.linear(*narrow).grad_fn).__name__


def reference_varlen(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int
) -> Tensor:
    """What the kernel does, one clip at a time; what no clip reads gets a gradient of NaN."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    unread = int(starts_k[-1])
    for x in (k, v):
        if x.requires_grad:
            x.register_hook(
                lambda g: g.clone().index_fill_(0, torch.arange(unread, len(g)), math.nan)
            )
    parts = []
    for row in range(len(starts_q) - 1):
        own_q, own_k = slice(*starts_q[row : row + 2]), slice(*starts_k[row : row + 2])
        assert own_q.stop - own_q.start <= max_q and own_k.stop - own_k.start <= max_k
        parts.append(exact(q[None, own_q], k[None, own_k], v[None, own_k], None)[0])
    return torch.cat(parts)


@pytest.mark.parametrize("masked", [False, True])
def test_varlen_leaves_masked_keys_out_and_their_gradients_zero(masked: bool):
    inputs = qkv(5, 7, torch.float64)
    mask = torch.tensor([[True, False, True, True, False, False, False], [True] * 6 + [False]])
    mask = mask if masked else None
    found = varlen_attention(*inputs, mask, reference_varlen)
    wanted = exact(*inputs, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(found.square().sum(), inputs)
    expected = torch.autograd.grad(wanted.square().sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "facts"),
    [
        ("flash2", CPU, torch.bfloat16, ("flash_attn", "not installed")),
        ("flash3", CPU, torch.bfloat16, ("flash_attn_interface", "not installed", "none")),
        ("flash4", CPU, torch.bfloat16, ("flash_attn.cute", "not installed")),
        ("varlen", CPU, torch.bfloat16, ("CUDA device", "cpu")),
        ("cudnn", CPU, torch.bfloat16, ("needs a CUDA device",)),
        ("cudnn", GPU, torch.float32, ("bfloat16", "float32")),
        ("flash", GPU, torch.float32, ("computes in bfloat16",)),
    ],
)
def test_a_backend_that_is_not_here_is_refused_with_those_that_are(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    facts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(attention_backends, "installed_packages", lambda: ())
    cfg = ModelConfig(attention=backend)
    with refuses(ConfigError, *facts) as error:
        prepare_attention(cfg, device, dtype)
    assert f"model.attention is '{backend}'" in str(error.value)
    says(error.value, "auto, sdpa")
    prepare_attention(ModelConfig(), device, dtype)


def test_head_widths_that_kernels_do_not_take_are_refused():
    with refuses(ConfigError, "multiples of 8", "256", "model.head_dim", "20"):
        prepare_attention(ModelConfig(head_dim=20, attention="flash"), GPU, torch.bfloat16)


def test_an_installed_package_is_found_without_importing_it(
    tmp_path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert attention_backends.installed_packages.__wrapped__() == ("flash2", "flash4")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch):
    """A GPU that has FlashAttention-4, as far as facts about it are asked for; afterwards it is gone again."""
    monkeypatch.setattr(attention_backends, "installed_packages", lambda: ("flash4",))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    # A run on a CPU before this one may have left it on.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)
    attention_backends._active.clear()


class Registered:
    def remove(self) -> None: ...


def test_auto_takes_flash_attention_4_by_way_of_pytorchs_flash_kernel(hopper, monkeypatch):
    assert resolve("auto", GPU, torch.bfloat16) == ("sdpa", torch.bfloat16)
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA4", Registered)
    with torch.random.fork_rng():
        prepare_attention(ModelConfig(), GPU, torch.bfloat16)
    try:
        assert torch.nn.attention.current_flash_attention_impl() == "FA4"
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert resolve("auto", GPU, torch.bfloat16) == ("flash4", torch.bfloat16)
    assert resolve("auto", GPU, torch.float32) == ("sdpa", torch.float32)
    assert resolve("auto", CPU, torch.float32) == ("sdpa", torch.float32)
    # Its graph holds the operator that selective checkpointing keeps, as one graph.
    inputs = qkv(9, 9, torch.float32)
    operators: list[str] = []

    def record(graph: torch.fx.GraphModule, _: object) -> object:
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    core = torch.compile(
        AttentionCore("flash4"), fullgraph=True, backend=aot_autograd(fw_compiler=record)
    )
    torch.testing.assert_close(core(*inputs).double(), exact(*inputs, None), rtol=1e-5, atol=1e-5)
    kept = {name.replace("::", ".") for name in ATTENTION}
    assert any(operator.removesuffix(".default") in kept for operator in operators)


def test_deterministic_runs_leave_auto_to_pytorch(hopper, monkeypatch):
    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA4", Registered)
    torch.use_deterministic_algorithms(True)
    try:
        prepare_attention(ModelConfig(), GPU, torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert resolve("auto", GPU, torch.bfloat16) == ("sdpa", torch.bfloat16)


@pytest.mark.parametrize("backend", ["auto", "flash4"])
def test_a_package_that_does_not_load_is_told_not_replaced(hopper, monkeypatch, backend: str):
    def broken() -> None:
        raise ImportError("libcute.so: cannot open shared object file")

    monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, "FA4", broken)
    with refuses(ConfigError, "libcute.so", backend):
        prepare_attention(ModelConfig(attention=backend), GPU, torch.bfloat16)


def test_deterministic_runs_give_cublas_workspaces_of_fixed_sizes(monkeypatch):
    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_determinism("auto", CPU)
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        set_determinism(True, GPU)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(before)


def test_training_refuses_a_missing_backend_before_it_reads_clips(parity_config, tmp_path):
    from sora_train.training.trainer import Trainer

    cfg = parity_config("model.attention=cudnn", "run.device=cpu")
    with refuses(ConfigError, "model.attention", "cudnn"):
        Trainer(cfg)
    assert not (tmp_path / "run").exists()


def test_unknown_attention_backend_is_refused():
    with pytest.raises(ConfigError, match="flash9"):
        AttentionCore("flash9")
    with pytest.raises(ValueError, match="flash9"):
        ModelConfig(attention="flash9")


def test_the_card_says_what_is_used():
    said = {
        "auto": "sdpa (chosen by auto) in float32",
        "flash3": "flash3 in bfloat16, masked captions by sdpa",
        "varlen": "varlen in bfloat16",
    }
    for backend, text in said.items():
        device, dtype = (CPU, torch.float32) if backend == "auto" else (GPU, torch.bfloat16)
        cfg = ModelConfig(attention=backend)
        assert describe(cfg, device, dtype, masked_captions=True) == text
    cfg = ModelConfig(attention="flash3")
    assert describe(cfg, GPU, torch.bfloat16, masked_captions=False) == "flash3 in bfloat16"
