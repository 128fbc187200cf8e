"""How long a step takes: compute of every bucket, what communication it cannot hide, imbalance, the optimizer.

A rank works on A = ceil(M / data ranks) micro-batches a step. One of a bucket takes

    products / (peak * gemm)  +  attention / (peak * its share)  +  bytes that norms and gates move
    + what blocks compute again  +  encoding  +  all-to-alls, which nothing hides
    +  what the ring cannot hide behind attention

on 1 / cp of its tokens. Gathering weights and reducing gradients go on behind compute; what is longer than `overlap`
of it, and the first unit, which has nothing before it, is waited for.
"""

from collections import Counter
from dataclasses import dataclass, field

import torch

from sora_train.config import Config
from sora_train.models.memory import ClipSize, block_bytes, compute_bytes, transformer_parameters
from sora_train.parallel.checks.volume import Slot, context_volume, fsdp_volume, zero_volume
from sora_train.parallel.degrees import Degrees
from sora_train.tools.plan.assumptions import Assumptions
from sora_train.tools.plan.time.cluster import GB, Cluster
from sora_train.tools.plan.time.links import Groups, Links, engine_seconds
from sora_train.tools.plan.time.work import BucketWork, Imbalance, StageWork

# FlashAttention-3 (arXiv:2407.08608, fig. 5-6), head width 128, long sequences on H100: about 650 and 550 of 989
# TFLOP/s;
# cuDNN's beside it about 600 and 500. They count on Hopper and after, where the peak is above 900 TFLOP/s.
FAST_KERNELS = {"flash3": (0.65, 0.55), "flash4": (0.65, 0.55), "cudnn": (0.60, 0.50)}
HOPPER_TFLOPS = 900
ADAM_BYTES = 36
"""Of a parameter in the optimizer's step: weight, two moments and average read and written, gradient read, in
float32."""
HOST_ADAM_BYTES = 12
"""Of a parameter that cross to the host and back where moments are there (docs/memory.md)."""
OFFLOADED_WAYS = 2
MERGE_BYTES = 36
"""Of a value of q that a ring's step moves in float32: its answer merged by log-sum-exp (read twice, written), and in
backward the gradients of q, k and v added up (parallel/ring.py)."""


@dataclass(frozen=True)
class BucketTime:
    """Seconds of one micro-batch of a bucket on a rank, by what they are spent on."""

    work: BucketWork
    products: float
    attention: float
    passes: float
    recompute: float
    encode: float
    exchange: float
    ring: float
    offload: float

    @property
    def compute(self) -> float:
        return self.products + self.attention + self.passes + self.recompute

    @property
    def total(self) -> float:
        return self.compute + self.encode + self.exchange + self.ring + self.offload


@dataclass(frozen=True)
class StepPlan:
    """A step of one layout. Times in seconds, averages over the mix."""

    slots: int
    """Micro-batches of a rank."""
    buckets: tuple[BucketTime, ...]
    gather: float
    """All communication of weights and gradients."""
    exposed: float
    """Of it, what is waited for."""
    imbalance: float
    optimizer: float
    other: float
    seconds: float
    flops: float
    """Of the model, all ranks."""
    recomputed: float
    """Operations that memory options add, all ranks."""
    tokens: float
    clips: float
    mfu: float
    volume: Counter[str] = field(default_factory=Counter)
    """Bytes of one rank by collective, as parallel/volume.py counts them; on average over the mix."""
    parts: dict[str, float] = field(default_factory=dict)
    """What the seconds are spent on; they add up."""


@dataclass(frozen=True)
class Bench:
    """What does not depend on the layout: built once a stage."""

    stage: StageWork
    cluster: Cluster
    assume: Assumptions
    units: list[list[torch.Size]]
    imbalance: Imbalance

    @property
    def size(self) -> int:
        """Bytes of a number in which weights compute."""
        return compute_bytes(self.stage.cfg.parallel.param_dtype, self.cluster.device)

    @property
    def peak(self) -> float:
        gpu = self.cluster.gpu
        return 1e12 * (gpu.tflops if self.size == 2 else gpu.tflops_fp32)

    def attention_shares(self) -> tuple[float, float]:
        """Shares of the peak that attention reaches, forward and backward."""
        gpu, assume = self.cluster.gpu, self.assume
        forward, backward = gpu.attention_forward, gpu.attention_backward
        if gpu.tflops > HOPPER_TFLOPS:
            kernel = self.stage.cfg.model.attention
            forward, backward = FAST_KERNELS.get(kernel, (forward, backward))
        return assume.attention_forward or forward, assume.attention_backward or backward


def again(cfg: Config) -> tuple[float, float, float]:
    """Shares of the forward pass's (products, attention, norms and gates) that backward computes again."""
    mode, every = cfg.parallel.activation_checkpointing, cfg.parallel.checkpoint_every
    layers = cfg.model.num_layers
    share = -(-layers // every) / layers if mode != "none" else 0.0
    kept = cfg.parallel.checkpoint_keep if mode == "selective" else ()
    products = 0.0 if "matmul" in kept else share
    if cfg.parallel.mlp_chunks > 1 and products < 1:
        ffn = 2 * cfg.model.ffn_dim / (2 * cfg.model.ffn_dim + 6 * cfg.model.dim)
        products = max(products, ffn)
    return products, 0.0 if "attention" in kept else share, share


def bucket_time(bench: Bench, cfg: Config, degrees: Degrees, work: BucketWork) -> BucketTime:
    """Of one micro-batch."""
    assume, gpu, cp = bench.assume, bench.cluster.gpu, degrees.cp
    forward, backward = bench.attention_shares()
    clips = work.clips / cp
    products = clips * (work.products + work.text) / (bench.peak * assume.gemm)
    attention = clips * work.attention / bench.peak
    saved = cfg.model.num_layers * block_bytes(
        cfg.model, ClipSize(work.tokens, work.frames, cfg.text.max_length), bench.size
    )
    passes = clips * saved / (gpu.memory_gb_s * GB)
    more, more_attention, more_passes = again(cfg)
    times = {
        "products": 3 * products,
        "attention": attention / forward + 2 * attention / backward,
        "passes": assume.passes * passes,
    }
    if assume.measured:
        seconds = clips * (
            cfg.data.cost_a * work.tokens + cfg.data.cost_b * work.tokens * work.tokens
        )
        factor = seconds / sum(times.values())
        times = {name: value * factor for name, value in times.items()}
    else:
        factor = 1.0
    recompute = factor * (
        more * products + more_attention * attention / forward + more_passes * passes
    )
    vae_peak = 1e12 * (gpu.tflops if cfg.vae.dtype == "bfloat16" else gpu.tflops_fp32)
    encode = clips * work.encode / (vae_peak * assume.convolution)
    encode += clips * work.caption / (bench.peak * assume.gemm)
    exchange, ring = _context_seconds(bench, cfg, degrees, work, times["attention"], more_attention)
    offload = 0.0
    if cfg.parallel.offload_activations:
        bytes_out = clips * (
            work.tokens * cfg.model.dim * 4 * cfg.model.num_layers if more_passes == 1 else saved
        )
        crossing = OFFLOADED_WAYS * bytes_out / (gpu.host_gb_s * GB)
        offload = max(0.0, crossing - assume.overlap * (sum(times.values()) + recompute))
    return BucketTime(
        work, times["products"], times["attention"], times["passes"], recompute, encode,
        exchange, ring, offload,
    )  # fmt: skip


def _context_seconds(
    bench: Bench, cfg: Config, degrees: Degrees, work: BucketWork, attention: float, again: float
) -> tuple[float, float]:
    """(all-to-alls, the ring beyond attention) of a micro-batch; exchanges of forward come again with it."""
    if degrees.cp == 1:
        return 0.0, 0.0
    volume = context_volume(cfg, degrees, slot_of(work), bench.size)
    groups = Groups.of(degrees, bench.cluster.gpu.gpus_per_node)
    links, blocks = Links.of(bench.cluster.gpu, bench.assume), cfg.model.num_layers
    group = groups.ulysses if degrees.ulysses > 1 else groups.ring
    exchange = links.exchange(group, volume["all_to_all"], 8 * blocks) * (1 + again / 2)
    merged = (
        degrees.ring * work.clips * work.tokens / degrees.cp * cfg.model.dim * MERGE_BYTES * blocks
    )
    merging = merged / (bench.cluster.gpu.memory_gb_s * GB) if degrees.ring > 1 else 0.0
    passed = links.pass_on(groups.ring, volume["send"], 4 * (degrees.ring - 1) * blocks)
    return exchange, merging + max(0.0, passed * (1 + again / 3) - attention)


def slot_of(work: BucketWork) -> Slot:
    return Slot(work.clips, work.frames, work.tokens // work.frames)


def step_volume(bench: Bench, cfg: Config, degrees: Degrees, slots: int) -> Counter[str]:
    """Bytes of one rank in a step of `slots` micro-batches as the mix has them."""
    size, wide = bench.size, max(4, bench.size)
    if cfg.parallel.engine == "fsdp":
        volume = fsdp_volume(cfg, degrees, bench.units, slots, size, wide)
    elif degrees.shards == 1:
        volume = Counter()
    else:
        volume = zero_volume(cfg.parallel.engine, bench.units, slots, size, wide)
    for share, work in zip(bench.stage.micro_share, bench.stage.works, strict=True):
        for kind, value in context_volume(cfg, degrees, slot_of(work), size).items():
            volume[kind] += round(slots * share * value)
    return volume


def step_plan(bench: Bench, cfg: Config, degrees: Degrees) -> StepPlan:
    """Predict a step of this layout and these memory options."""
    assume, cluster = bench.assume, bench.cluster
    ranks = cluster.gpus // degrees.cp
    slots = -(-cfg.train.micro_batches // ranks)
    stage, full = bench.stage, bench.imbalance.fullness
    times = tuple(bucket_time(bench, cfg, degrees, work) for work in stage.works)

    def mean(name: str) -> float:
        return slots * full * stage.mean([getattr(time, name) for time in times])

    links = Links.of(cluster.gpu, assume)
    groups = Groups.of(degrees, cluster.gpu.gpus_per_node)
    volume = step_volume(bench, cfg, degrees, slots)
    engine = Counter(
        {kind: volume[kind] for kind in ("all_gather", "reduce_scatter", "all_reduce")}
    )
    gather = sum(engine_seconds(engine, groups, links, len(bench.units), slots))
    compute = mean("compute")
    # ZeRO-1 and -2 gather after the optimizer's step, behind nothing.
    hidden = 0.0 if cfg.parallel.engine in ("zero1", "zero2") else assume.overlap * compute
    exposed = max(gather - hidden, gather / len(bench.units)) if gather else 0.0
    parts = {
        "matrix products": mean("products"),
        "attention": mean("attention"),
        "norms and gates": mean("passes"),
        "computed again": mean("recompute"),
        "frozen encoders": mean("encode"),
        "token exchange (Ulysses, ring)": mean("exchange") + mean("ring"),
        "weights, gradients: exposed": exposed,
        "activations to the host: exposed": mean("offload"),
    }
    waits = bench.imbalance.of(ranks)
    work_seconds = sum(parts.values())
    parts["ranks that wait for others"] = work_seconds * waits / (1 - waits)
    trained = transformer_parameters(cfg.model)[0]
    shards = degrees.shards if cfg.parallel.engine == "fsdp" else cluster.gpus
    moved = ADAM_BYTES / (cluster.gpu.memory_gb_s * GB)
    if cfg.parallel.offload_optimizer:
        moved += HOST_ADAM_BYTES / (cluster.gpu.host_gb_s * GB)
    parts["optimizer and average"] = trained / shards * moved
    parts["control plane, logging"] = assume.step_seconds
    parts["data"] = sum(parts.values()) * assume.data_wait / (1 - assume.data_wait)
    seconds, micro = sum(parts.values()), cfg.train.micro_batches * full
    flops = micro * stage.mean([w.clips * w.flops for w in stage.works])
    more, more_attention, _ = again(cfg)
    recomputed = micro * stage.mean(
        [w.clips * (more * w.products + more_attention * w.attention) for w in stage.works]
    )
    return StepPlan(
        slots, times, gather, exposed, waits, parts["optimizer and average"],
        parts["control plane, logging"] + parts["data"], seconds, flops, recomputed,
        micro * stage.mean([float(w.clips * w.tokens) for w in stage.works]),
        micro * stage.mean([float(w.clips) for w in stage.works]),
        flops / (seconds * cluster.gpus * bench.peak), volume, parts,
    )  # fmt: skip
