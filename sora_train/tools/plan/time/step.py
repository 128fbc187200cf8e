"""How long a step takes: compute of every bucket, what communication it cannot hide, imbalance, the optimizer.

A rank works on A = ceil(M / data ranks) micro-batches a step. One of a bucket takes

    products / (peak * gemm)  +  attention / (peak * its kernel's share)  +  bytes that norms and gates move
    + what blocks compute again  +  encoding where nothing is cached  +  all-to-alls, which nothing hides
    +  what the ring cannot hide behind attention  +  copies of weights  +  moments in which the host is late

on 1 / cp of its tokens. Attention's backward computes five products for the forward's two, of which MFU counts four.
Gathering weights and reducing gradients go on behind compute; what is longer than `overlap`
of it, and the first unit, which has nothing before it, is waited for.
"""

import itertools
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import torch

from sora_train.config import Config
from sora_train.models.memory import (
    COMPILED,
    ClipSize,
    block_bytes,
    compiles,
    compute_bytes,
    transformer_parameters,
)
from sora_train.models.quantised.sizes import frozen_sizes
from sora_train.parallel.checks.volume import Slot, context_volume, fsdp_volume, zero_volume
from sora_train.parallel.degrees import Degrees
from sora_train.tools.plan.assumptions import Assumptions
from sora_train.tools.plan.time.caching import encode_seconds
from sora_train.tools.plan.time.cluster import GB, Cluster
from sora_train.tools.plan.time.links import Groups, Links, engine_seconds
from sora_train.tools.plan.time.rates import Rates, rates_of
from sora_train.tools.plan.time.work import BucketWork, Imbalance, StageWork

BACKWARD_PRODUCTS = 2.5
"""Products of attention's backward for one of its forward: the scores are computed again."""
UPDATE_BYTES = 48
"""Of a parameter at the end of a step, in float32: its gradient read for the norm, read and written by the clip, read
by AdamW; weight, two moments and average read and written."""
COPY_BYTES = 26
"""Of a parameter and micro-batch that an engine copies, here FSDP2: two gathers in bfloat16, each written, read and
written again (16), gradients read and added up in float32 (10)."""
ONE_RANK_COPY_BYTES = 16
"""The same on one rank, which keeps copies in bfloat16 (parallel/memory/masters.py): each gradient read and added up in
float32 (10), and once a step the copies made anew (6)."""
BUDGET_AGAIN = ((0.0, 1.0), (0.5, 0.75), (0.7, 0.54), (1.0, 0.0))
"""`parallel.activation_memory_budget` -> time of what is computed again, as a share of the forward pass's norms and
gates: 18 ms at 0.5 and 13 ms at 0.7 for a clip whose bytes take 24 ms to be written once."""
HOST_ADAM_BYTES = 12
"""Of a parameter that cross to the host and back where moments are there (docs/memory.md)."""
OFFLOADED_WAYS = 2
WIDENED_PASSES = 3
"""How often a value crosses the card's memory in the compute precision while codes are widened: written, then read and
written as it is scaled."""
NF4_BYTES = 4
"""Of a value of nf4 besides: the numbers of the pairs that are looked up, written and read, and the pairs."""
MERGE_BYTES = 36
"""Of a value of q that a ring's step moves in float32: its answer merged by log-sum-exp (read twice, written), and in
backward the gradients of q, k and v added up (parallel/ring.py)."""


@dataclass(frozen=True)
class BucketTime:
    """Seconds of one micro-batch of a bucket on a rank, by what they are spent on."""

    work: BucketWork
    products: float
    forward: float
    """Of self-attention."""
    backward: float
    cross: float
    """Attention to captions, both ways."""
    passes: float
    recompute: float
    widened: float
    """Codes of a frozen base made wide, each way."""
    swapped: float
    """What of a frozen base comes from the host and is waited for."""
    copies: float
    """Of weights and gradients inside a rank."""
    video: float
    """The VAE, where nothing is cached."""
    text: float
    exchange: float
    ring: float
    offload: float
    host: float

    @property
    def attention(self) -> float:
        return self.forward + self.backward + self.cross

    @property
    def compute(self) -> float:
        return self.products + self.attention + self.passes + self.recompute + self.widened

    @property
    def total(self) -> float:
        moved = self.exchange + self.ring + self.offload + self.swapped
        return self.compute + self.copies + self.video + self.text + moved + self.host


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
    floors: dict[str, float] = field(default_factory=dict)
    """Of a part, the seconds that no kernel goes below: products at `plan.ceiling`, bytes at the memory's speed."""


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

    @cached_property
    def rates(self) -> Rates:
        """Shares of the peak, and where they come from."""
        return rates_of(self.stage.cfg, self.cluster, self.assume)


def again(cfg: Config) -> tuple[float, float, float]:
    """Shares of the forward pass's (products, attention, norms and gates) that backward computes again."""
    budget = cfg.parallel.activation_memory_budget
    if budget < 1:
        # Below a half, products and attention too: a straight line to all of them at 0.
        deep = max(0.0, 1 - 2 * budget)
        return deep, deep, budget_again(budget)
    mode, every = cfg.parallel.activation_checkpointing, cfg.parallel.checkpoint_every
    layers = cfg.model.num_layers
    share = -(-layers // every) / layers if mode != "none" else 0.0
    kept = cfg.parallel.checkpoint_keep if mode == "selective" else ()
    products = 0.0 if "matmul" in kept else share
    if cfg.parallel.mlp_chunks > 1 and products < 1:
        ffn = 2 * cfg.model.ffn_dim / (2 * cfg.model.ffn_dim + 6 * cfg.model.dim)
        products = max(products, ffn)
    return products, 0.0 if "attention" in kept else share, share


def budget_again(budget: float) -> float:
    """BUDGET_AGAIN, a straight line between its numbers."""
    for (low, at_low), (high, at_high) in itertools.pairwise(BUDGET_AGAIN):
        if budget <= high:
            return at_low + (at_high - at_low) * (budget - low) / (high - low)
    return 0.0


def bucket_time(bench: Bench, cfg: Config, degrees: Degrees, work: BucketWork) -> BucketTime:
    """Of one micro-batch."""
    assume, gpu, cp, rates = bench.assume, bench.cluster.gpu, degrees.cp, bench.rates
    clips = work.clips / cp
    products = clips * (work.products + work.text) / (bench.peak * rates.gemm)
    own = clips * (work.attention - work.cross) / bench.peak
    cross = clips * work.cross * (1 + BACKWARD_PRODUCTS) / (bench.peak * rates.cross)
    size = ClipSize(work.tokens, work.frames, cfg.text.max_length)
    share = COMPILED if compiles(cfg.model, cfg.parallel, bench.cluster.device) else 1.0
    frozen = frozen_sizes(cfg) if cfg.adapter.on else None
    saved = cfg.model.num_layers * share * block_bytes(cfg.model, size, bench.size, frozen=frozen)
    passes = clips * saved / rates.memory
    times = {
        "products": work.passes * products,
        "forward": own / rates.forward,
        "backward": BACKWARD_PRODUCTS * own / rates.backward,
        "cross": cross,
        "passes": assume.passes * passes,
    }
    factor = 1.0
    if assume.measured:
        a, b = cfg.data.cost_a, cfg.data.cost_b
        seconds = clips * (a * work.tokens + b * work.tokens * work.tokens)
        factor = seconds / sum(times.values())
        times = {name: value * factor for name, value in times.items()}
    more, more_attention, more_passes = again(cfg)
    core = own / rates.forward + cross / (1 + BACKWARD_PRODUCTS)
    recompute = factor * (more * products + more_attention * core + more_passes * passes)
    video, text = encode_seconds(work, cfg, bench.cluster, assume)
    if bench.stage.cached:
        video, text = 0.0, text * bench.stage.spilled
    exchange, ring = _context_seconds(
        bench, cfg, degrees, work, times["forward"] + times["backward"], more_attention
    )
    offload = 0.0
    if cfg.parallel.offload_activations:
        bytes_out = clips * (
            work.tokens * cfg.model.dim * 4 * cfg.model.num_layers if more_passes == 1 else saved
        )
        crossing = OFFLOADED_WAYS * bytes_out / (gpu.host_gb_s * GB)
        offload = max(0.0, crossing - assume.overlap * (sum(times.values()) + recompute))
    widened, crossing = base_seconds(bench, cfg, more) if frozen else (0.0, 0.0)
    swapped = max(0.0, crossing - assume.overlap * (sum(times.values()) + recompute + widened))
    return BucketTime(
        work, **times, recompute=recompute, widened=widened, swapped=swapped, copies=copy_seconds(bench, cfg, degrees),
        video=clips * video, text=clips * text, exchange=exchange, ring=ring, offload=offload,
        host=assume.micro_batch_seconds,
    )  # fmt: skip


def base_seconds(bench: Bench, cfg: Config, again: float) -> tuple[float, float]:
    """Seconds of a micro-batch in which a frozen base (is widened, crosses from the host); `again` is the share of the
    forward pass that backward repeats."""
    sizes, memory = frozen_sizes(cfg), cfg.memory
    block = sizes.block_bytes(memory.base, bench.size)
    # In either pass a swapped block comes once, but for the two that are there at the turn.
    crossing = 2 * max(0, memory.swap_blocks - 2) * block / (bench.cluster.gpu.host_gb_s * GB)
    if memory.base == "compute":
        return 0.0, crossing
    values = sum(out * inputs for out, inputs in sizes.matrices)
    moved = block + values * WIDENED_PASSES * bench.size
    moved += values * NF4_BYTES if memory.base == "nf4" else 0
    return (2 + again) * sizes.blocks * moved / bench.rates.memory, crossing


def trained_values(cfg: Config) -> int:
    """Values of the transformer that get gradients."""
    return frozen_sizes(cfg).trained if cfg.adapter.on else transformer_parameters(cfg.model)[0]


def copy_seconds(bench: Bench, cfg: Config, degrees: Degrees) -> float:
    """Seconds in which a rank copies gathered weights and adds up gradients, a micro-batch."""
    if bench.size != 2 or bench.cluster.device == "cpu":
        return 0.0
    each = COPY_BYTES if degrees.shards > 1 else ONE_RANK_COPY_BYTES
    return trained_values(cfg) * each / bench.rates.memory


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
    merging = merged / bench.rates.memory if degrees.ring > 1 else 0.0
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
    if cfg.adapter.on:
        # The base is gathered as it is kept and never reduced.
        sizes, whole = frozen_sizes(cfg), transformer_parameters(cfg.model)[0]
        base = sizes.resident_bytes(cfg.memory.base, 0, size) / (whole * size)
        for kind in volume:
            share = base if kind == "all_gather" else sizes.trained / whole
            volume[kind] = round(volume[kind] * share)
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
        "attention, forward": mean("forward"),
        "attention, backward": mean("backward"),
        "attention to captions": mean("cross"),
        "norms and gates": mean("passes"),
        "computed again": mean("recompute"),
        "frozen weights widened": mean("widened"),
        "frozen weights from the host: exposed": mean("swapped"),
        "copies of weights": slots * times[0].copies,
        "weights, gradients: exposed": exposed,
        "token exchange (Ulysses, ring)": mean("exchange") + mean("ring"),
        "activations to the host: exposed": mean("offload"),
        "VAE": mean("video"),
        "text encoder": mean("text"),
        "host, each micro-batch": slots * assume.micro_batch_seconds,
    }
    waits = bench.imbalance.of(ranks)
    work_seconds = sum(parts.values())
    parts["ranks that wait for others"] = work_seconds * waits / (1 - waits)
    parts["norm, optimizer, average"] = update_seconds(bench, cfg, degrees)
    parts["host, end of a step"] = assume.step_seconds
    parts["data"] = sum(parts.values()) * assume.data_wait / (1 - assume.data_wait)
    seconds, micro = sum(parts.values()), cfg.train.micro_batches * full
    flops = micro * stage.mean([w.clips * w.flops for w in stage.works])
    more, more_attention, _ = again(cfg)
    recomputed = micro * stage.mean(
        [w.clips * (more * w.products + more_attention * w.attention) for w in stage.works]
    )
    return StepPlan(
        slots, times, gather, exposed, waits, seconds, flops, recomputed,
        micro * stage.mean([float(w.clips * w.tokens) for w in stage.works]),
        micro * stage.mean([float(w.clips) for w in stage.works]),
        flops / (seconds * cluster.gpus * bench.peak), volume, parts, floors_of(bench, parts),
    )  # fmt: skip


def update_seconds(bench: Bench, cfg: Config, degrees: Degrees) -> float:
    """Seconds of the gradients' norm, the optimizer's step and the average."""
    trained = trained_values(cfg)
    shards = degrees.shards if cfg.parallel.engine == "fsdp" else bench.cluster.gpus
    seconds = UPDATE_BYTES / bench.rates.memory
    if cfg.parallel.offload_optimizer:
        seconds += HOST_ADAM_BYTES / (bench.cluster.gpu.host_gb_s * GB)
    return trained / shards * seconds


def floors_of(bench: Bench, parts: dict[str, float]) -> dict[str, float]:
    """Of each part, the seconds that the card needs at its best; what is not named could be none."""
    rates, best = bench.rates, bench.assume.ceiling
    shares = {
        "matrix products": rates.gemm, "attention, forward": rates.forward,
        "attention, backward": rates.backward, "attention to captions": rates.cross,
    }  # fmt: skip
    floors = {name: parts[name] * min(1.0, share / best) for name, share in shares.items()}
    return floors | {name: parts[name] for name in ("norms and gates", "norm, optimizer, average")}
