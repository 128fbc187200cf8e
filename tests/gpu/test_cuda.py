"""What only a GPU can tell. Without one these skip; benchmarks/gpu_suite.sh runs them where there is one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sora_train.checkpoint.staging import Staging
from sora_train.config import ModelConfig
from sora_train.metrics import read_metrics
from sora_train.models.attention import AttentionCore
from sora_train.models.attention_backends import BACKENDS, missing
from sora_train.models.dit import VideoDiT
from sora_train.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]


def losses(run_dir: str) -> list[float]:
    return [row["train/loss"] for row in read_metrics(Path(run_dir) / "metrics.jsonl")]


def test_a_gpu_follows_the_cpu_in_float32(parity_config: Callable) -> None:
    plain = ["optim=sgd", "optim.grad_clip=0", "parallel.param_dtype=float32"]
    cpu = parity_config(*plain, "run.device=cpu", name="cpu")
    gpu = parity_config(*plain, "run.device=cuda", name="gpu")
    Trainer(cpu).train()
    Trainer(gpu).train()
    assert losses(gpu.run.dir) == pytest.approx(losses(cpu.run.dir), rel=2e-3)


def test_bfloat16_stays_near_float32(parity_config: Callable) -> None:
    single = parity_config("run.device=cuda", "parallel.param_dtype=float32", name="fp32")
    half = parity_config("run.device=cuda", "parallel.param_dtype=bfloat16", name="bf16")
    Trainer(single).train()
    Trainer(half).train()
    assert losses(half.run.dir) == pytest.approx(losses(single.run.dir), rel=3e-2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_kernels_and_gradients_are_near_the_definition(
    backend: str, masked: bool
) -> None:
    cuda = torch.device("cuda")
    reason = missing(backend, cuda, torch.bfloat16)
    if reason:
        pytest.skip(f"model.attention={backend}, {reason}")
    draws = torch.Generator().manual_seed(0)
    exactly = [torch.randn(2, n, 3, 128, generator=draws).double() for n in (70, 40, 40)]
    inputs = [x.to(cuda, torch.bfloat16).requires_grad_() for x in exactly]
    exactly = [x.detach().double().cpu().requires_grad_() for x in inputs]
    mask = torch.rand(2, 40, generator=draws) < 0.6
    mask[:, 0] = True
    found = AttentionCore(backend)(*inputs, mask.cuda() if masked else None)
    wanted = AttentionCore("math")(*exactly, mask if masked else None)
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=2e-2, atol=2e-2)
    got = torch.autograd.grad(found.float().square().sum(), inputs)
    expected = torch.autograd.grad(wanted.square().sum(), exactly)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("backend", ["sdpa", "gemm"])
def test_attention_backends_agree_with_float64(backend: str) -> None:
    cfg = ModelConfig(
        num_layers=2, num_heads=2, head_dim=64, ffn_dim=256, text_dim=32, attention=backend
    )
    model = VideoDiT(cfg)
    model.init_weights(0)
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(2, cfg.in_channels, 3, 8, 8, generator=draws)
    t = torch.rand(2, 3, generator=draws)
    captions = torch.randn(2, 9, 32, generator=draws)
    reference = model.double()(latents.double(), t.double(), captions.double())
    found = model.float().cuda()(latents.cuda(), t.cuda(), captions.cuda())
    torch.testing.assert_close(found.double().cpu(), reference, rtol=2e-3, atol=2e-3)


def test_what_is_copied_for_a_save_is_of_before_the_next_step() -> None:
    """The weights change as soon as the call returns, while the copy may not even have begun."""
    weights = {"w": torch.zeros(64 << 20, device="cuda"), "step": torch.zeros(())}
    staging = Staging(weights)
    assert staging.buffers["w"].is_pinned() and staging.fits(weights)
    for value in (1.0, 2.0):
        weights["w"].fill_(value)
        weights["step"].fill_(value)
        staging.copy(weights)
        weights["w"].fill_(-1.0)
        staging.wait()
        assert (staging.read("w") == value).all() and staging.read("step") == value
