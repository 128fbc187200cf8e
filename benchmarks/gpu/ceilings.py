"""What the card reaches at its best: a large matrix product, a copy, and attention by each kernel, both ways.

    python -m benchmarks.gpu.ceilings --out benchmarks/results [--toy]

`sora plan` takes these rates in the place of published ones for a card of the same name. Attention has the shape of Wan
2.1 1.3B at 480p and 81 frames; its backward counts five products for the forward's two, as its makers count it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sora_train.config import ModelConfig
from sora_train.device.measuring import Measured, Result, Stats, measure
from sora_train.errors import ConfigError
from sora_train.models.transformer.attention_backends import attend, prepare_attention
from sora_train.runtime.world import pick_device

KERNELS = ("flash", "cudnn", "flash3", "flash4")
"""flash4 is last: it takes the place of PyTorch's flash kernel for the rest of the process."""
REPEATS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="small sizes, on a CPU")
    options = parser.parse_args()
    device = pick_device("cpu" if options.toy else "cuda")
    result = Result("ceilings", {}, {"device": str(device)})
    side, values = (64, 1 << 12) if options.toy else (8192, 1 << 30)
    size = (1, 64, 2, 16) if options.toy else (1, 32_760, 12, 128)
    result.measured["gemm"] = product(side, device)
    result.measured["copy"] = copied(values, device)
    result.write(options.out)
    for kernel in ("sdpa",) if options.toy else KERNELS:
        try:
            cfg = ModelConfig.model_validate({"attention": kernel, "head_dim": size[3]})
            prepare_attention(cfg, device, torch.bfloat16)
            forward, backward = attention(kernel, size, device)
        except (ConfigError, RuntimeError) as error:
            result.facts[f"not measured, {kernel}"] = " ".join(str(error).split())[:200]
        else:
            result.measured[f"forward, {kernel}"] = forward
            result.measured[f"backward, {kernel}"] = backward
        result.write(options.out)
    print(result.to_markdown())
    return 0


def rate(work: float, seconds: Stats, unit: str) -> Measured:
    """`work` in units of `unit` times seconds, over the seconds it took."""
    return Measured(
        Stats(work / seconds.median, work / seconds.p90, work / seconds.p10, seconds.n), unit
    )


def product(side: int, device: torch.device) -> Measured:
    """Two square matrices in bfloat16."""
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return rate(2 * side**3 / 1e12, measure(lambda: left @ right, 3, REPEATS), "TFLOP/s")


def copied(values: int, device: torch.device) -> Measured:
    """float32 read and written."""
    source = torch.randn(values, device=device)
    target = torch.empty_like(source)
    return rate(8 * values / 1e9, measure(lambda: target.copy_(source), 3, REPEATS), "GB/s")


def attention(
    kernel: str, size: tuple[int, int, int, int], device: torch.device
) -> tuple[Measured, Measured]:
    """(forward, backward) of queries, keys and values of `size` (B, L, N, K), bfloat16."""
    batch, length, heads, width = size
    q, k, v = (
        torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    work = 4 * batch * heads * width * length**2 / 1e12

    def forward() -> Tensor:
        return attend(kernel, q, k, v, None)

    answer = forward()
    cotangent = torch.randn_like(answer)

    def backward() -> object:
        return torch.autograd.grad(answer, (q, k, v), cotangent, retain_graph=True)

    timed: list[Callable[[], object]] = [forward, backward]
    once, back = (measure(each, 2, REPEATS) for each in timed)
    return rate(work, once, "TFLOP/s"), rate(2.5 * work, back, "TFLOP/s")


if __name__ == "__main__":
    raise SystemExit(main())
