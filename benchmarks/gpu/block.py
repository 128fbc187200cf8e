"""One compiled block of Wan 2.1 1.3B, forward and backward: seconds to compile, of a step, and of its kernels by class.

python -m benchmarks.gpu.block --out benchmarks/results [--toy]
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import OPTIONS, built, first_weights, step_of
from benchmarks.model import ModelBenchRequest, batch_of, clip_flops, model_of
from sora_train.device import measuring
from sora_train.device.measuring import Measured, Result, Stats
from sora_train.models.transformer.attention_backends import prepare_attention
from sora_train.monitoring.device_peaks import peak_flops
from sora_train.runtime.world import grow_segments, pick_device

CLASSES = {
    "attention": ("flash", "fmha", "cudnn", "attention", "sdpa"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "mm"),
    "norms and gates": ("triton", "elementwise", "reduce", "mul", "add"),
}
"""Part of the step -> pieces of the names of its kernels; the first that is in a name counts."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="small sizes, on a CPU, not compiled")
    options = parser.parse_args()
    grow_segments()
    device = pick_device("cpu" if options.toy else "cuda")
    dtype = torch.float32 if options.toy else torch.bfloat16
    sizes = ["model.num_heads=2"] if options.toy else ["model=wan_1_3b"]
    cfg = model_of([*sizes, "model.num_layers=1"])
    tokens, caption = (64, 16) if options.toy else (32_760, 512)
    request = ModelBenchRequest(cfg, tokens=tokens, caption=caption, repeats=10)
    prepare_attention(cfg, device, dtype)
    model, _ = built(cfg, OPTIONS["nothing"], first_weights(cfg, dtype, device), device)
    step = step_of(model, batch_of(request, dtype, device))
    result = Result("block", {}, {"tokens": tokens, "attention": cfg.attention})
    began = time.perf_counter()
    step()
    measuring.synchronize()
    result.facts["first step with compilation, s"] = time.perf_counter() - began
    result.write(options.out)
    seconds = measuring.measure(step, 2, request.repeats)
    result.measured["step"] = Measured(seconds, "s")
    if device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name(device))):
        result.facts["MFU"] = clip_flops(request) / seconds.median / peak
    result.write(options.out)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as found:
        step()
        measuring.synchronize()
    for name, spent in by_class(found, device).items():
        result.measured[name] = Measured(Stats.of([spent]), "s")
    found.export_chrome_trace(str(options.out / "block_trace.json.gz"))
    result.write(options.out)
    print(result.to_markdown())
    return 0


def by_class(found: profile, device: torch.device) -> dict[str, float]:
    """Seconds on the device (on a CPU, of operators) by class, and of the rest."""
    spent: Counter[str] = Counter()
    for event in found.key_averages():
        on_device = (
            event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        )
        name = event.key.lower()
        part = next(
            (part for part, pieces in CLASSES.items() if any(piece in name for piece in pieces)),
            "other",
        )
        spent[part] += on_device / 1e6
    return dict(spent)


if __name__ == "__main__":
    raise SystemExit(main())
