"""Shares of a card's peak that its kernels reach, each with its source: measured on that card, else published.

What `model.attention` comes to on the planned card is named too: a plan that says `sdpa` says nothing, since
PyTorch's SDPA is cuDNN on Hopper (from torch 2.11) and FlashAttention-2 before it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from sora_train.config import Config
from sora_train.errors import ConfigError
from sora_train.tools.plan.assumptions import Assumptions
from sora_train.tools.plan.time.cluster import GB, Cluster

CHECKOUT = Path(__file__).resolve().parents[4]
RESULTS = Path("benchmarks") / "results" / "ceilings.json"
"""Where `benchmarks/gpu_suite.sh` leaves what it measured."""

HOPPER_TFLOPS = (900, 1500)
"""Peaks, in TFLOP/s, between which a card is taken for Hopper."""
KERNELS: dict[str, tuple[float, float, str]] = {
    "flash4": (
        0.76, 0.65,
        "FlashAttention-4: 752 and 639 TFLOP/s, published with NVIDIA's cudnn-frontend for an H200 at 32,760 tokens",
    ),
    "cudnn": (
        0.58, 0.56,
        "cuDNN: 575 and 550 TFLOP/s, below the 620 and 554 published with NVIDIA's cudnn-frontend for an H200 at "
        "32,760 tokens",
    ),
    "flash3": (
        0.65, 0.55,
        "FlashAttention-3: 650 and 550 TFLOP/s on H100 (arXiv:2407.08608, figures 5 and 6)",
    ),
}  # fmt: skip
"""Kernel -> shares of the peak forward and backward on Hopper, and their source: head width 128, no mask, whose
backward counts five products for the forward's two."""
CHOSEN = ("auto", "sdpa")
"""Values of `model.attention` that leave the kernel to the card and to what is installed."""


@dataclass(frozen=True)
class Rates:
    """Shares of the peak, and where they come from."""

    kernel: str
    """Of self-attention."""
    forward: float
    backward: float
    cross: float
    gemm: float
    memory: float
    """Bytes a second of the card's memory."""
    sources: tuple[str, ...]


def rates_of(cfg: Config, cluster: Cluster, assume: Assumptions) -> Rates:
    """What the card is taken to reach: `plan.*` where set, else measured, else published.

    Raises:
        ConfigError: `plan.results` names a file that is not what the suite writes.
    """
    kernel, found = kernel_of(cfg, cluster, assume), measured_on(cluster, assume)
    forward, backward, source = _published(kernel, cluster)
    gemm, bandwidth = assume.gemm, assume.bandwidth
    sources = [f"attention: {source}"]
    if found:
        peak, attention = cluster.gpu.tflops, (f"forward, {kernel}", f"backward, {kernel}")
        if all(name in found for name in attention):
            forward, backward = (found[name] / peak for name in attention)
            sources = [f"attention: {kernel}, measured on this card"]
        if "copy" in found:
            bandwidth = found["copy"] / cluster.gpu.memory_gb_s
            sources.append("memory: measured on this card")
    if assume.attention_forward or assume.attention_backward:
        sources = ["attention: plan.attention_forward, plan.attention_backward"]
    return Rates(
        kernel,
        assume.attention_forward or forward,
        assume.attention_backward or backward,
        min(assume.cross, forward),
        gemm,
        bandwidth * cluster.gpu.memory_gb_s * GB,
        tuple(sources),
    )


def kernel_of(cfg: Config, cluster: Cluster, assume: Assumptions) -> str:
    """The kernel that `model.attention` comes to on this card."""
    asked = cfg.model.attention
    if cfg.run.deterministic is True and asked in CHOSEN and cluster.device == "cuda":
        return "flash"
    if cluster.device == "cpu" or asked not in CHOSEN:
        return {"auto": "sdpa", "varlen": "flash"}.get(asked, asked)
    if cluster.gpu.tflops < HOPPER_TFLOPS[0]:
        return "flash"
    return "flash4" if asked == "auto" and assume.flash4 else "cudnn"


def is_hopper(cluster: Cluster) -> bool:
    return HOPPER_TFLOPS[0] < cluster.gpu.tflops < HOPPER_TFLOPS[1]


def _published(kernel: str, cluster: Cluster) -> tuple[float, float, str]:
    gpu = cluster.gpu
    if cluster.device == "cuda" and gpu.tflops > HOPPER_TFLOPS[0] and kernel in KERNELS:
        forward, backward, source = KERNELS[kernel]
        return forward, backward, source if is_hopper(cluster) else f"{source}; taken as on Hopper"
    return gpu.attention_forward, gpu.attention_backward, f"{kernel}, as published for this card"


def measured_on(cluster: Cluster, assume: Assumptions) -> dict[str, float]:
    """What the suite's first part measured on a card of this name: TFLOP/s and GB/s by name; nothing elsewhere."""
    path = Path(assume.results) if assume.results else CHECKOUT / RESULTS
    if not path.is_file():
        if assume.results:
            raise ConfigError(
                f"plan.results={assume.results} is no file; give the ceilings.json that benchmarks/gpu_suite.sh wrote"
            )
        return {}
    try:
        read = json.loads(path.read_text())
        card, values = read["machine"]["gpu"], read["measured"]
        numbers = {name: float(value["median"]) for name, value in values.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not the ceilings.json that benchmarks/gpu_suite.sh writes ({error}); run its part 0 again"
        ) from error
    return numbers if cluster.name.lower() in card.lower().split() else {}
