"""What only a GPU can tell. Without one these skip; benchmarks/gpu_suite.sh runs them where there is one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sora_train.checkpoint.staging import Staging
from sora_train.config import ModelConfig
from sora_train.models.transformer.attention import AttentionCore
from sora_train.models.transformer.attention_backends import BACKENDS, missing
from sora_train.models.transformer.dit import VideoDiT
from sora_train.monitoring.metrics import read_metrics
from sora_train.parallel.memory.activations import checkpoint_blocks
from sora_train.parallel.memory.offload import offload_blocks
from sora_train.training.trainer import Trainer

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


@pytest.mark.parametrize("length", [1, 255, 256, 257, 509])
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_no_kernel_reads_what_was_never_written(backend: str, length: int) -> None:
    """Whatever memory a kernel is given was NaN before, at lengths around its tiles."""
    cuda = torch.device("cuda")
    reason = missing(backend, cuda, torch.bfloat16)
    if backend == "cudnn" and length == 1:
        reason = "which refuses a single key"
    if reason:
        pytest.skip(f"model.attention={backend}, {reason}")
    draws = torch.Generator().manual_seed(length)
    inputs = [
        torch.randn(2, n, 3, 128, generator=draws).to(cuda, torch.bfloat16).requires_grad_()
        for n in (length, length, length)
    ]
    exactly = [x.detach().double().cpu().requires_grad_() for x in inputs]
    poison()
    found = AttentionCore(backend)(*inputs)
    poison()
    got = torch.autograd.grad(found.float().square().sum(), inputs)
    wanted = AttentionCore("math")(*exactly)
    expected = torch.autograd.grad(wanted.square().sum(), exactly)
    for a, b in zip((found, *got), (wanted, *expected), strict=True):
        assert not a.isnan().any()
        torch.testing.assert_close(a.double().cpu(), b, rtol=5e-2, atol=5e-2)


def poison() -> None:
    """Leave NaN in the memory that the allocator hands out next, in blocks of all sizes."""
    blocks = [
        torch.full((1 << power,), float("nan"), device="cuda")
        for power in range(7, 24)
        for _ in range(4)
    ]
    torch.cuda.synchronize()
    del blocks


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("offload", [False, True])
def test_memory_options_give_the_gradients_of_keeping_everything(mode: str, offload: bool) -> None:
    """Copies run on a stream of their own here; a graph is used twice, so that memory is used again."""
    sizes = dict(num_layers=6, num_heads=4, head_dim=64, ffn_dim=1024, text_dim=32)
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, 3, 32, 32, generator=draws).cuda()
    t, captions = torch.rand(2, 3, generator=draws).cuda(), torch.randn(2, 9, 32, generator=draws)
    found = []
    for saving in (False, True):
        model = VideoDiT(ModelConfig(**sizes, attention="math"))
        model.init_weights(0)
        torch.nn.init.normal_(
            model.proj_out.weight, std=0.02, generator=torch.Generator().manual_seed(1)
        )
        model = model.cuda()
        if saving:
            checkpoint_blocks(model, mode)
            if offload:
                offload_blocks(model)
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            model(latents, t, captions.cuda()).square().sum().backward()
        found.append([p.grad.cpu() for p in model.parameters() if p.grad is not None])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_moments_on_the_host_train_alike(parity_config: Callable) -> None:
    plain = ["run.device=cuda", "parallel.param_dtype=float32", "optim=adamw"]
    beside = parity_config(*plain, name="beside")
    host = parity_config(*plain, "parallel.offload_optimizer=true", name="host")
    Trainer(beside).train()
    Trainer(host).train()
    assert losses(host.run.dir) == pytest.approx(losses(beside.run.dir), rel=1e-3)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
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
        staging.let_write()
        weights["w"].fill_(-1.0)
        staging.wait()
        assert (staging.read("w") == value).all() and staging.read("step") == value


def test_a_step_waits_for_nothing_that_pytorch_knows_of(parity_config: Callable) -> None:
    """Every copy or read that would wait for the device raises; reading the outcome waits for an event of its own."""
    cfg = parity_config(
        "run.device=cuda",
        "optim=adamw",
        "text.trainable=false",
        "data.cache=latents",
        "train.steps=8",
    )
    trainer = Trainer(cfg)
    try:
        # An epoch, in which captions are stored as they are met.
        for _ in range(4):
            trainer.train_step()
        torch.cuda.set_sync_debug_mode("error")
        trainer.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        trainer.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bad_step_changes_nothing_on_the_device(parity_config: Callable, dtype: str) -> None:
    cfg = parity_config("run.device=cuda", "optim=adamw", f"parallel.param_dtype={dtype}")
    trainer = Trainer(cfg)
    try:
        trainer.train_step()
        engine = trainer.engine
        before = {name: value.clone() for name, value in trainer.parts.tensors().items()}
        for parameter in engine.model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan"))
        norm = engine.gradient_norm()
        engine.step(0.1, norm, ~norm.isfinite())
        for name, value in trainer.parts.tensors().items():
            assert torch.equal(value, before[name]), name
    finally:
        trainer.close()
