"""Which layouts and memory options there are, which fit, and which is fastest.

Layouts are tried with their memory options from the cheapest on, by the model of models/memory.py, and the first that
fits is timed; then the fastest are checked by what `memory_of` counts.
"""

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sora_train.config import Config
from sora_train.data.tape.tape import slot_efficiency
from sora_train.errors import ConfigError
from sora_train.models.memory import (
    ClipSize,
    adapter_bytes,
    clip_bytes,
    compiles,
    fixed_bytes,
    moment_copies,
    text_parameters,
)
from sora_train.models.quantised.codes import GROUP
from sora_train.models.quantised.sizes import frozen_sizes
from sora_train.parallel.degrees import Degrees, check_degrees, describe_layout
from sora_train.tools.plan.memory.encoders import frozen_text_bytes
from sora_train.tools.plan.memory.plan import ALLOWANCE, SLACK, MemoryPlan, memory_of
from sora_train.tools.plan.time.cluster import GIB
from sora_train.tools.plan.time.step import Bench, StepPlan, step_plan, trained_values
from sora_train.tools.plan.time.work import BucketWork

MOST_CP = 64
MAX_LAYOUTS = 1500
SHOWN = 5
CHECKED = 8
"""Fastest candidates whose memory is counted before the search gives up."""

DEEPSPEED_MUST_SAVE = 0.02
"""Share of a step by which a DeepSpeed engine must be faster to be preferred: FSDP2 also keeps replicas, compiles
every block and reads weights from anywhere."""
MEMORY_OPTIONS: tuple[dict[str, Any], ...] = (
    {"activation_checkpointing": "none"},
    {"activation_checkpointing": "none", "activation_memory_budget": 0.7},
    {"activation_checkpointing": "none", "activation_memory_budget": 0.5},
    {"activation_checkpointing": "selective", "checkpoint_keep": ("attention", "matmul")},
    {"activation_checkpointing": "selective", "checkpoint_keep": ("attention", "matmul"), "mlp_chunks": 4},
    {"activation_checkpointing": "full", "checkpoint_every": 4},
    {"activation_checkpointing": "full", "checkpoint_every": 2},
    {"activation_checkpointing": "selective", "checkpoint_keep": ("attention",)},
    {"activation_checkpointing": "full"},
    {"activation_checkpointing": "full", "mlp_chunks": 4},
    {"activation_checkpointing": "full", "offload_activations": True},
    {"activation_checkpointing": "full", "offload_activations": True, "mlp_chunks": 8},
)  # fmt: skip
"""From the fastest to the smallest; a budget is for blocks that are compiled."""
BASES: dict[str, float] = {"compute": 1.0, "int8": 1.03, "nf4": 1.2}
"""How a frozen base may be kept, and how many times as long a step may take without it to be preferred: what is lost is
quality. fp8 is as large as int8, and further from the weights."""
SWAPPED = (0.25, 0.5, 0.75, 1.0)
"""Shares of the blocks that are tried on the host, beside none."""
PLAIN: dict[str, Any] = {
    "activation_checkpointing": "none", "checkpoint_every": 1, "checkpoint_keep": ("attention", "matmul"),
    "mlp_chunks": 1, "offload_activations": False, "offload_optimizer": False, "offload_params": False,
    "accumulate": "whole", "activation_memory_budget": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A layout with its memory options."""

    cfg: Config
    degrees: Degrees
    step: StepPlan
    memory: MemoryPlan | None
    """None where it was not counted: slower ones."""
    estimate: float
    """Bytes by models/memory.py."""

    @property
    def name(self) -> str:
        return name_of(self.cfg, self.cfg.parallel.engine, self.degrees)

    @property
    def options(self) -> str:
        return describe_options(self.cfg)

    @property
    def rank(self) -> tuple[float, float]:
        """The smaller the better."""
        handicap = 1 if self.cfg.parallel.engine == "fsdp" else 1 + DEEPSPEED_MUST_SAVE
        return self.step.seconds * handicap * BASES.get(self.cfg.memory.base, 1.0), self.bytes

    @property
    def bytes(self) -> float:
        return self.memory.peak if self.memory else self.estimate


@dataclass(frozen=True)
class RefusedLayout:
    """A layout, and why it is not recommended."""

    name: str
    reason: str
    over: float = 0.0
    """GiB that it lacks."""


@dataclass(frozen=True)
class SearchResult:
    best: list[Candidate]
    """Fitting ones, the fastest first."""
    refused: list[RefusedLayout]
    tried: int


def name_of(cfg: Config, engine: str, degrees: Degrees) -> str:
    """`fsdp x2`, and with an adapter how the base is kept: `single, base int8`."""
    layout = describe_layout(engine, degrees)
    return f"{layout}, base {cfg.memory.base}" if cfg.adapter.on else layout


def describe_options(cfg: Config) -> str:
    """Memory options in words."""
    parallel = cfg.parallel
    mode = parallel.activation_checkpointing
    kept = "+".join(parallel.checkpoint_keep)
    every = f" every {parallel.checkpoint_every}" if parallel.checkpoint_every > 1 else ""
    options = [
        {"none": "", "full": f"full{every}", "selective": f"selective ({kept}){every}"}[mode],
        f"memory budget {parallel.activation_memory_budget:g}"
        if parallel.activation_memory_budget < 1
        else "",
        f"mlp_chunks {parallel.mlp_chunks}" if parallel.mlp_chunks > 1 else "",
        "offload activations" if parallel.offload_activations else "",
        "offload moments" if parallel.offload_optimizer else "",
        "sharded gradients" if parallel.accumulate == "sharded" else "",
        f"{cfg.memory.swap_blocks} blocks swapped" if cfg.memory.swap_blocks else "",
        "encoded first" if cfg.memory.encode_first else "",
    ]
    return ", ".join(filter(None, options)) or "none"


def overrides_of(cfg: Config) -> list[str]:
    """What sets this layout and these options, ready to paste."""
    parallel = cfg.parallel
    names = ["engine", "dp_replicate", "dp_shard", "ulysses", "ring", "activation_checkpointing"]
    overrides = [f"parallel.{name}={getattr(parallel, name)}" for name in names]
    if parallel.activation_checkpointing == "selective":
        overrides.append(f"parallel.checkpoint_keep=[{','.join(parallel.checkpoint_keep)}]")
    for name in ("checkpoint_every", "activation_memory_budget", "mlp_chunks", "accumulate"):
        if getattr(parallel, name) != PLAIN[name]:
            overrides.append(f"parallel.{name}={getattr(parallel, name)}")
    for name in ("offload_activations", "offload_optimizer"):
        if getattr(parallel, name):
            overrides.append(f"parallel.{name}=true")
    if cfg.adapter.on:
        memory = cfg.memory
        overrides += [f"memory.base={memory.base}", f"memory.swap_blocks={memory.swap_blocks}"]
        overrides.append(f"memory.encode_first={str(memory.encode_first).lower()}")
    return overrides


def divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def layouts(bench: Bench) -> Iterator[tuple[str, Degrees]]:
    """Engines and degrees that fill the cluster, divide the heads and leave few slots idle."""
    world, cfg = bench.cluster.gpus, bench.stage.cfg
    per_node = bench.cluster.gpu.gpus_per_node
    for cp in divisors(world):
        if cp > MOST_CP:
            break
        ranks = world // cp
        if slot_efficiency(cfg.train.micro_batches, ranks) < cfg.elastic.min_efficiency - 1e-9:
            continue
        for ulysses in divisors(cp):
            if cfg.model.num_heads % ulysses or ulysses > per_node:
                continue
            for shard in divisors(ranks):
                shards = shard * cp
                # Groups that lie across nodes without filling them talk more than they save.
                if shards > per_node and shards % per_node and shards != world:
                    continue
                yield "fsdp", Degrees(ranks // shard, shard, ulysses, cp // ulysses)
            for engine in ("zero1", "zero2", "zero3"):
                if world > 1:
                    yield engine, Degrees(1, ranks, ulysses, cp // ulysses)


def with_layout(cfg: Config, engine: str, degrees: Degrees, options: dict[str, Any]) -> Config:
    """The configuration with this layout and these options, those of the section `memory` among them."""
    memory: dict[str, Any] = {
        name: options[name] for name in ("base", "swap_blocks") if name in options
    }
    rest = {name: value for name, value in options.items() if name not in memory}
    parallel = {
        **PLAIN, **rest, "engine": engine, "dp_replicate": degrees.dp_replicate,
        "dp_shard": degrees.dp_shard, "ulysses": degrees.ulysses, "ring": degrees.ring,
    }  # fmt: skip
    return cfg.model_copy(
        update={
            "parallel": cfg.parallel.model_copy(update=parallel),
            "memory": cfg.memory.model_copy(update=memory),
        }
    )


def variants(bench: Bench, engine: str, degrees: Degrees, base: str) -> tuple[dict[str, Any], ...]:
    """The memory options to try, from the fastest on: MEMORY_OPTIONS, and with a frozen base on one card how many
    blocks are swapped."""
    cfg = bench.stage.cfg
    if not cfg.adapter.on:
        return MEMORY_OPTIONS
    layers, alone = cfg.model.num_layers, bench.cluster.gpus == 1
    swaps = sorted({0, *(round(share * layers) for share in SWAPPED if alone and layers > 3)})
    tried = [
        {**options, "base": base, "swap_blocks": swap}
        for options in MEMORY_OPTIONS
        for swap in swaps
    ]

    def seconds(options: dict[str, Any]) -> float:
        return step_plan(bench, with_layout(cfg, engine, degrees, options), degrees).seconds

    return tuple(sorted(tried, key=seconds))


def bases(cfg: Config) -> tuple[str, ...]:
    """Ways to keep the base that are tried; one that the config asks for is the only one."""
    if not cfg.adapter.on or cfg.memory.base != "compute":
        return (cfg.memory.base,)
    fits = all(width % GROUP == 0 for width in (cfg.model.dim, cfg.model.ffn_dim))
    return tuple(base for base in BASES if base != "nf4" or fits)


def estimate_bytes(bench: Bench, cfg: Config, degrees: Degrees) -> tuple[float, BucketWork]:
    """Bytes of a rank by models/memory.py, and the bucket that needs most."""
    model, text, w = cfg.model, cfg.text, bench.size
    shards, cp = degrees.shards, degrees.cp
    moments = moment_copies(cfg.optim, model, text)
    averages = 1 + len(cfg.ema.more) + len(cfg.ema.post_hoc)
    split = cfg.parallel.model_copy(
        update={"dp_shard": shards, "dp_replicate": degrees.dp_replicate}
    )
    sizes = frozen_sizes(cfg) if cfg.adapter.on else None
    if sizes:
        fixed = adapter_bytes(cfg, sizes, w=w, moments=moments, averages=averages, shards=shards)
        fixed += 0 if text.trainable else text_parameters(text) * 4
    else:
        fixed = fixed_bytes(
            model, text, split, w=w, moments=moments, micro_batches=cfg.train.micro_batches * cp,
            averages=averages,
        )  # fmt: skip
    trained = trained_values(cfg)
    if cfg.parallel.engine in ("zero1", "zero2"):
        # Weights whole in the compute precision; gradients whole, in ZeRO-2 only until they are reduced.
        fixed += trained * w + (trained * 4 if cfg.parallel.engine == "zero1" else 0)

    # Of a published encoder models/memory.py knows no sizes.
    frozen, caption = frozen_text_bytes(text)
    if not text.trainable:
        fixed += (0 if cfg.memory.encode_first else frozen) - text_parameters(text) * 4
    at_rest = frozen if cfg.memory.encode_first else fixed
    if bench.cluster.device == "cuda":
        fixed += ALLOWANCE
        at_rest += ALLOWANCE

    def needs(work: BucketWork) -> float:
        clip = ClipSize(-(-work.tokens // cp), work.frames, text.max_length)
        device = bench.cluster.device
        return work.clips * clip_bytes(model, text, clip, w, device, cfg.parallel, frozen=sizes)

    worst = max(bench.stage.works, key=needs)
    # While captions are encoded no activations are there.
    together = 1 if cfg.memory.encode_first else max(work.clips for work in bench.stage.works)
    encoding = at_rest + together * caption
    return max(fixed + (1 + SLACK) * needs(worst), encoding), worst


def search(bench: Bench, progress: Callable[[str, int, int], None]) -> SearchResult:
    """Try all layouts; `progress(what, done, of)` is told how far it is."""
    cap = bench.cluster.memory * (1 - bench.assume.reserve)
    candidates: list[Candidate] = []
    refused: list[RefusedLayout] = []
    kept = bases(bench.stage.cfg)
    todo = [(*layout, base) for layout in layouts(bench) for base in kept][:MAX_LAYOUTS]
    for number, (engine, degrees, base) in enumerate(todo):
        progress("layouts", number, len(todo))
        layout = cheapest_that_fits(bench, engine, degrees, cap, base)
        if isinstance(layout, Candidate):
            candidates.append(layout)
        else:
            refused.append(layout)
    best = fastest(bench, candidates, refused, cap, progress)
    return SearchResult(best, _reasons(bench, best, candidates, refused), len(todo))


def fastest(
    bench: Bench,
    candidates: list[Candidate],
    refused: list[RefusedLayout],
    cap: float,
    progress: Callable[[str, int, int], None],
) -> list[Candidate]:
    """The fastest of each kind, fastest first; the first `plan.counted` of them have their memory counted.

    Always the fastest that waits is looked at. One that is counted and does not fit waits again with smaller, slower
    memory options, or is refused; so what is found first is the fastest that fits.
    """
    waiting = sorted(candidates, key=lambda each: each.rank)
    best: list[Candidate] = []
    checked = 0
    while waiting and len(best) < SHOWN:
        candidate = waiting.pop(0)
        if _kind(candidate.name) in {_kind(each.name) for each in best}:
            continue  # a slower one of a kind that is there already
        if len(best) >= bench.assume.counted or checked == CHECKED:
            best.append(candidate)
            continue
        progress("memory", checked, CHECKED)
        checked += 1
        counted = with_memory(bench, candidate)
        if counted.bytes <= cap:
            best.append(counted)
            continue
        smaller = with_smaller_options(bench, counted, cap)
        if isinstance(smaller, Candidate):
            insort(waiting, smaller, key=lambda each: each.rank)
        else:
            refused.append(smaller)
    return best


def cheapest_that_fits(
    bench: Bench, engine: str, degrees: Degrees, cap: float, base: str, first: int = 0
) -> Candidate | RefusedLayout:
    """The layout with the first memory options, of those after `first`, that fit by the estimate."""
    ranks = bench.cluster.gpus // degrees.cp
    several = bench.stage.cfg.train.micro_batches > ranks and engine == "fsdp"
    sharded = several and degrees.shards > 1
    least = float("inf")
    for options in variants(bench, engine, degrees, base)[first:]:
        for accumulate in ("whole", "sharded") if sharded else ("whole",):
            cfg = with_layout(
                bench.stage.cfg, engine, degrees, {**options, "accumulate": accumulate}
            )
            compiled = compiles(cfg.model, cfg.parallel, bench.cluster.device)
            if cfg.parallel.activation_memory_budget < 1 and not compiled:
                continue
            needed, _ = estimate_bytes(bench, cfg, degrees)
            least = min(least, needed)
            if needed <= cap:
                return Candidate(cfg, degrees, step_plan(bench, cfg, degrees), None, needed)
    over = (least - cap) / GIB
    asked = with_layout(bench.stage.cfg, engine, degrees, {"base": base})
    return too_large(name_of(asked, engine, degrees), over)


def with_smaller_options(bench: Bench, counted: Candidate, cap: float) -> Candidate | RefusedLayout:
    """The layout with the next memory options that fit by the estimate, after some that were counted and do not."""
    engine, base = counted.cfg.parallel.engine, counted.cfg.memory.base
    tried = variants(bench, engine, counted.degrees, base)
    matching = (n for n, options in enumerate(tried) if _has(counted.cfg, options))
    first = next(matching, len(tried)) + 1
    following = cheapest_that_fits(bench, engine, counted.degrees, cap, base, first)
    if isinstance(following, RefusedLayout):
        return too_large(counted.name, (counted.bytes - cap) / GIB)
    return following


def too_large(name: str, over: float) -> RefusedLayout:
    return RefusedLayout(name, f"memory over by {over:,.1f} GiB at the least", over)


def _has(cfg: Config, options: dict[str, Any]) -> bool:
    has = {**cfg.parallel.model_dump(), **cfg.memory.model_dump()}
    return all(
        has[name] == value for name, value in {**PLAIN, **options}.items() if name != "accumulate"
    )


def with_memory(bench: Bench, candidate: Candidate) -> Candidate:
    """The candidate with the memory of its worst bucket counted.

    The count is of eager code; of blocks that are compiled, activations are the share of it that models/memory.py
    gives."""
    cfg, device = candidate.cfg, bench.cluster.device
    _, worst = estimate_bytes(bench, cfg, candidate.degrees)
    counted = memory_of(cfg, bench.cluster.gpus, worst.bucket, worst.clips, device)
    if counted.when in ("forward", "backward"):
        clip = ClipSize(worst.tokens, worst.frames, cfg.text.max_length)
        eager = cfg.model.model_copy(update={"compile": "off"})
        plain = cfg.parallel.model_copy(update={"activation_memory_budget": 1.0})
        sizes = frozen_sizes(cfg) if cfg.adapter.on else None
        kept, of = (
            clip_bytes(model, cfg.text, clip, bench.size, device, parallel, frozen=sizes)
            for model, parallel in ((cfg.model, cfg.parallel), (eager, plain))
        )
        spared = round(counted.activations * (1 - kept / of))
        counted = replace(
            counted, activations=counted.activations - spared, peak=counted.peak - spared
        )
    return replace(candidate, memory=counted)


def _reasons(
    bench: Bench, best: list[Candidate], candidates: list[Candidate], refused: list[RefusedLayout]
) -> list[RefusedLayout]:
    """One line for each kind of layout that is not among the best: the nearest of its kind."""
    if not best:
        return sorted(refused, key=lambda each: each.over)[:SHOWN]
    reasons, kinds = [], {_kind(each.name) for each in best}
    for each in candidates:
        if _kind(each.name) not in kinds:
            kinds.add(_kind(each.name))
            slower = 100 * (each.step.seconds / best[0].step.seconds - 1)
            if slower >= 0:
                name = f"{each.name} ({each.options})"
                reasons.append(RefusedLayout(name, f"slower by {slower:.1f} %"))
    for layout in sorted(refused, key=lambda each: each.over):
        if _kind(layout.name) not in kinds:
            kinds.add(_kind(layout.name))
            reasons.append(layout)
    return reasons[:8] + _undivided(bench)


def _kind(name: str) -> str:
    """The words of a layout without its numbers, bar those of context parallelism; a base of its own is a kind."""
    name, _, base = name.partition(", ")
    head, *rest = name.split(" x ")
    return base + " x ".join([head.split(" ")[0], *(part.split(" ")[0] for part in rest)])


def _undivided(bench: Bench) -> list[RefusedLayout]:
    cfg, per_node = bench.stage.cfg, bench.cluster.gpu.gpus_per_node
    refused = []
    for ulysses in divisors(min(per_node, bench.cluster.gpus)):
        degrees = Degrees(1, max(1, bench.cluster.gpus // ulysses), ulysses, 1)
        try:
            check_degrees(cfg, degrees)
        except ConfigError as error:
            refused.append(RefusedLayout(f"ulysses {ulysses}", str(error).split(";")[0]))
    return refused
