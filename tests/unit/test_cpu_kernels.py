"""The kernels of a CPU follow from measurements, are found once and stay the run's; a config can fix them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sora_train.models.transformer import cpu_kernels
from sora_train.models.transformer.cpu_kernels import (
    ATTENTION,
    DEFAULT,
    LINEAR,
    WORTH,
    Kernels,
    ShapeClass,
    choose,
    fastest,
    in_use,
    use,
)
from sora_train.models.transformer.cpu_trials import step_of
from sora_train.models.transformer.layers import RMSNorm, RMSNormOnCpu
from sora_train.training import kernels as settling
from sora_train.training.trainer import Trainer

TINY = ShapeClass.of(1, 8, 1, 16, 32)


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    use(DEFAULT)


def timed(seconds: dict[Kernels, float]) -> tuple[Callable[[], None], Callable[[], float]]:
    """A step that takes as long as its kernels are said to, and the clock that shows it."""
    now = [0.0]

    def step() -> None:
        now[0] += seconds[in_use()]

    return step, lambda: now[0]


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_the_fastest_is_taken_and_none_that_is_hardly_faster(times: list[float]) -> None:
    seconds = dict(zip(ATTENTION, times, strict=True))
    first, second = (fastest(ATTENTION, *timed(seconds)) for _ in range(2))
    assert first == second and in_use() == DEFAULT
    taken, least = seconds[first[0]], min(times)
    assert taken <= least / WORTH * (1 + 1e-9)
    if seconds[DEFAULT] * WORTH <= least:
        assert first[0] == DEFAULT


def test_a_choice_is_found_once_for_each_shape_thread_count_and_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def counted(part: str, shape: ShapeClass) -> Callable[[], object]:
        asked.append(part)
        return lambda: None

    chosen = choose(TINY, counted)
    assert choose(TINY, counted) == chosen and asked == ["attention", "linear"]
    choose(ShapeClass.of(1, 64, 1, 16, 32), counted)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    choose(TINY, counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    choose(TINY, counted)
    assert asked == ["attention", "linear"] * 4
    files = list(cpu_kernels.cache_folder().iterdir())
    assert len(files) == 4
    for file in files:
        file.write_text("{")
    choose(TINY, counted)
    choose(TINY, counted)
    assert asked == ["attention", "linear"] * 5, "a damaged file is measured again, once"


def test_a_cache_that_cannot_be_written_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert isinstance(choose(TINY, lambda part, shape: lambda: None), Kernels)


def test_sizes_near_each_other_share_a_choice() -> None:
    assert ShapeClass.of(3, 1000, 12, 64, 9) == ShapeClass.of(4.4, 1024, 16, 64, 9)
    assert ShapeClass.of(1, 500, 1, 64, 9) != ShapeClass.of(1, 520, 1, 64, 9)


@pytest.mark.parametrize("part", ["attention", "linear"])
def test_a_trial_takes_forward_and_backward_of_what_is_in_use(part: str) -> None:
    step, found = step_of(part, TINY), []
    for kernels in (*ATTENTION, *LINEAR[1:]):
        with cpu_kernels.using(kernels):
            found.append([gradient.float() for gradient in step()])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0.03 * float(b.abs().max()))


# --- a run ---


def start(config: object) -> dict:
    trainer = Trainer(config)
    trainer.close()
    return json.loads((Path(config.run.dir) / "run.json").read_text())


def test_a_run_notes_its_kernels_and_goes_on_with_them(
    parity_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = parity_config("parallel.param_dtype=bfloat16", "run.device=cpu", "run.threads=1")
    first = Kernels("gemm", linear_in_float32=True)
    monkeypatch.setattr(settling, "choose", lambda shape, step: first)
    noted = start(cfg)["kernels"]
    assert in_use() == first and noted.items() >= asdict(first).items()
    monkeypatch.setattr(settling, "choose", lambda shape, step: DEFAULT)
    use(DEFAULT)
    assert start(cfg)["kernels"] == noted and in_use() == first

    monkeypatch.setattr(settling, "circumstances", lambda: {"cpu": "another"})
    assert start(cfg)["kernels"]["found on"] == {"cpu": "another"} and in_use() == DEFAULT


@pytest.mark.parametrize(
    "fixed",
    [
        ["parallel.param_dtype=float32"],
        ["parallel.param_dtype=bfloat16", "run.deterministic=true"],
        ["parallel.param_dtype=bfloat16", "model.attention=gemm"],
    ],
    ids=str,
)
def test_nothing_is_measured_where_the_config_fixes_the_kernels(
    fixed: list[str], parity_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Kernels:
        raise AssertionError("measured")

    monkeypatch.setattr(settling, "choose", never)
    use(Kernels("gemm", linear_in_float32=True))
    assert "kernels" not in start(parity_config("run.device=cpu", *fixed))
    assert in_use() == DEFAULT


@pytest.mark.slow
def test_a_cpu_that_imitates_bfloat16_widens_its_products(tmp_path: Path) -> None:
    """What libraries are told counts, not the CPU's flags."""
    code = (
        "from sora_train.models.transformer.cpu_kernels import *\n"
        "from sora_train.models.transformer.cpu_trials import step_of\n"
        "print(choose(ShapeClass.of(1, 256, 2, 64, 512), step_of).linear_in_float32)"
    )
    limits = {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=os.environ | limits | cache, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


# --- RMS norm ---


def test_rms_norm_and_its_gradients_are_those_of_the_definition() -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 7, generator=draws, dtype=torch.float64).requires_grad_()
    weight = torch.randn(7, generator=draws, dtype=torch.float64).requires_grad_()
    expected = x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight
    torch.testing.assert_close(RMSNormOnCpu.apply(x, weight, 1e-3), expected, rtol=1e-13, atol=0)
    norm = lambda *inputs: RMSNormOnCpu.apply(*inputs, 1e-3)  # noqa: E731
    assert torch.autograd.gradcheck(norm, (x, weight))
    assert torch.autograd.gradcheck(lambda *inputs: norm(*inputs).transpose(1, 2), (x, weight))


def test_rms_norm_is_exact_to_float32() -> None:
    draws = torch.Generator().manual_seed(0)
    norm, x = RMSNorm(384, eps=1e-6), 5 * torch.randn(4, 512, 384, generator=draws)
    torch.nn.init.normal_(norm.weight, generator=draws)
    cotangent = torch.randn(x.shape, generator=draws)

    def both(dtype: torch.dtype, forward: Callable) -> list[torch.Tensor]:
        leaves = [value.detach().to(dtype).requires_grad_() for value in (x, norm.weight)]
        y = forward(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(dtype))]

    exactly = both(torch.float64, lambda x, w: F.rms_norm(x, (384,), w, 1e-6))
    for a, b in zip(
        both(torch.float32, lambda x, w: RMSNormOnCpu.apply(x, w, 1e-6)), exactly, strict=True
    ):
        assert float((a.double() - b).norm() / b.norm()) < 3e-6
    narrow = norm.bfloat16()(x.bfloat16())
    assert narrow.dtype == torch.float32
