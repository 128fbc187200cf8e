"""The plan of a run: for each stage work, layout, memory, step, checkpoints, hours and cost, as plain values.

What the terminal, the page and the JSON show is all read from what `plan_run` returns, so they cannot differ.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from sora_train.config import Config
from sora_train.errors import ConfigError, UserError
from sora_train.models.flops import FORMULA
from sora_train.models.memory import moment_copies, text_parameters
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.transformer.dit import VideoDiT
from sora_train.parallel.checks.volume import units_of
from sora_train.parallel.degrees import check_degrees, resolve_degrees
from sora_train.tools.plan.assumptions import Assumptions
from sora_train.tools.plan.search import (
    Candidate,
    SearchResult,
    describe_options,
    estimate_bytes,
    overrides_of,
    search,
    too_large,
    with_memory,
)
from sora_train.tools.plan.time.caching import Caching, caching_of
from sora_train.tools.plan.time.cluster import GB, GIB, Cluster
from sora_train.tools.plan.time.failures import schedule
from sora_train.tools.plan.time.step import Bench, step_plan, trained_values
from sora_train.tools.plan.time.work import Imbalance, StageWork, stage_work

Values = dict[str, Any]
Progress = Callable[[str, int, int], None]
SAVE_SECONDS = 0.05
"""Of a save besides the copy to the host."""


def plan_run(
    cfg: Config,
    stages: tuple[Config, ...],
    cluster: Cluster,
    assume: Assumptions,
    progress: Progress,
) -> Values:
    """The plan of a run and its stages (none: the run itself is the only one).

    Raises:
        ConfigError: something cannot be planned, or the config's own layout does not fit (plan.keep_layout).
        UserError: no layout fits the memory.
    """
    if assume.measured and not (cfg.data.cost_a or cfg.data.cost_b):
        raise ConfigError(
            "plan.measured=true, but data.cost_a and data.cost_b are 0; give the two that `sora bench cost` printed"
        )
    names = [stage.name for stage in cfg.stages] or [cfg.name]
    planned, notes, units = [], dict[str, None](), _Units()
    for name, stage in zip(names, stages or (cfg,), strict=True):

        def stage_progress(what: str, done: int, of: int, name: str = name) -> None:
            progress(f"{name}: {what}", done, of)

        bench, caching = bench_of(stage, cluster, assume, units.of(stage))
        notes.update(dict.fromkeys((*bench.stage.notes, *bench.rates.sources)))
        planned.append(_stage(name, bench, caching, stage.data.cache, stage_progress))
    total = {key: sum(stage[key] for stage in planned) for key in ("hours", "gpu_hours", "cost")}
    mix = "plan.mix" if assume.mix else "classes by their probability, buckets of a class alike"
    return {
        "name": cfg.name,
        "cluster": {"name": str(cluster), "gpus": cluster.gpus, "nodes": cluster.nodes,
                    "memory_gib": cluster.gpu.memory_gib, **cluster.gpu.model_dump()},
        "parameters": trained_parameters(cfg),
        "stages": planned,
        "total": {**total, "days": total["hours"] / 24},
        "notes": [f"shares of the clips are assumed: {mix}", *notes],
        "assumptions": assume.model_dump(),
    }  # fmt: skip


def bench_of(
    cfg: Config, cluster: Cluster, assume: Assumptions, units: list[list[torch.Size]]
) -> tuple[Bench, Caching]:
    """What does not depend on the layout of a stage, and whether its clips are encoded once."""
    work = stage_work(cfg, assume)
    caching = caching_of(work, cluster, assume)
    work = replace(work, cfg=with_caching(cfg, caching, assume), spilled=caching.spilled)
    return Bench(work, cluster, assume, units, Imbalance(work)), caching


def with_caching(cfg: Config, caching: Caching, assume: Assumptions) -> Config:
    """The config with the cache that was chosen; an adapter's run then encodes all before the model is there."""
    data = cfg.data.model_copy(update={"cache": caching.mode})
    first = cfg.memory.encode_first
    if cfg.adapter.on and not assume.keep_layout:
        first = caching.mode == "latents" and not caching.spilled
    memory = cfg.memory.model_copy(update={"encode_first": first})
    return cfg.model_copy(update={"data": data, "memory": memory})


def formula_of(cfg: Config) -> str:
    """FORMULA, in which backward through a frozen base is one forward pass and not two."""
    return FORMULA.replace("3 (", "2 (", 1) if cfg.adapter.on else FORMULA


def trained_parameters(cfg: Config) -> int:
    """Of an adapter, or of the transformer and a text encoder that is trained with it."""
    if cfg.adapter.on:
        return trained_values(cfg)
    return trained_values(cfg) + (text_parameters(cfg.text) if cfg.text.trainable else 0)


class _Units:
    """Shapes of the parameters by model, each built once."""

    def __init__(self) -> None:
        self._known: dict[str, list[list[torch.Size]]] = {}

    def of(self, cfg: Config) -> list[list[torch.Size]]:
        key = cfg.model.model_dump_json() + cfg.text.model_dump_json()
        if key not in self._known:
            self._known[key] = units_of_config(cfg)
        return self._known[key]


def units_of_config(cfg: Config) -> list[list[torch.Size]]:
    """Shapes of the parameters of each unit that is gathered at once, from a model without memory."""
    # A frozen text encoder is no part of what is sharded, and may not be on this machine.
    if cfg.text.trainable:
        return units_of(TextToVideo(cfg.model, cfg.text, empty=True))
    with torch.device("meta"):
        return units_of(VideoDiT(cfg.model)) * (2 if cfg.model.expert == "both" else 1)


def _stage(name: str, bench: Bench, caching: Caching, asked: str, progress: Progress) -> Values:
    result = own_layout(bench) if bench.assume.keep_layout else search(bench, progress)
    if not result.best:
        nearest = "; ".join(f"{each.name}: {each.reason}" for each in result.refused[:3])
        raise UserError(
            f"stage {name}: none of {result.tried} layouts fits {bench.cluster} "
            f"({nearest or 'train.micro_batches leaves ranks idle'}); take more GPUs or larger ones, smaller buckets, "
            "or another train.micro_batches"
        )
    best = result.best[0]
    cfg, step = best.cfg, best.step
    saves = _saves(bench, best)
    gpus = bench.cluster.gpus
    first = caching.once / gpus / 3600 if bench.stage.cached else 0.0
    hours = first + cfg.train.steps * step.seconds / 3600 / saves["goodput"]
    paste = [] if caching.mode == asked else [f"data.cache={caching.mode}"]
    return {
        "name": name,
        "steps": cfg.train.steps,
        "layout": best.name,
        "options": best.options,
        "overrides": overrides_of(cfg) + paste,
        "caching": {**asdict(caching), "hours": first},
        "memory": memory_values(best),
        "micro_batches": cfg.train.micro_batches,
        "slots": step.slots,
        "buckets": _buckets(bench.stage, best),
        "step": {
            "seconds": step.seconds, "parts": step.parts, "tokens": step.tokens, "clips": step.clips,
            "tflop": step.flops / 1e12, "recomputed_tflop": step.recomputed / 1e12,
            "mfu": step.mfu, "tokens_per_second": step.tokens / step.seconds,
            "imbalance": step.imbalance, "floors": step.floors, "kernel": asdict(bench.rates),
            "formula": formula_of(cfg), "at_bar": step.seconds * step.mfu / bench.assume.bar, "bar": bench.assume.bar,
        },
        "communication": {
            "gb": {kind: value / GB for kind, value in sorted(step.volume.items())},
            "bytes": dict(sorted(step.volume.items())),
            "seconds": step.gather, "not_hidden": step.exposed,
        },
        "saves": saves,
        "hours": hours,
        "gpu_hours": hours * gpus,
        "cost": hours * gpus * bench.cluster.gpu.price,
        "tried": result.tried,
        "candidates": [_row(each, best) for each in result.best],
        "refused": [asdict(each) for each in result.refused],
    }  # fmt: skip


def own_layout(bench: Bench) -> SearchResult:
    """The config's own layout, checked and counted.

    Raises:
        ConfigError: it does not fill the cluster or divide the model.
    """
    cfg = bench.stage.cfg
    try:
        degrees = resolve_degrees(cfg.parallel, bench.cluster.gpus)
        check_degrees(cfg, degrees)
    except ConfigError as error:
        raise ConfigError(f"cluster={bench.cluster}: {error}") from error
    parallel = {"dp_replicate": degrees.dp_replicate, "dp_shard": degrees.dp_shard}
    cfg = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update=parallel)})
    estimate, _ = estimate_bytes(bench, cfg, degrees)
    candidate = Candidate(cfg, degrees, step_plan(bench, cfg, degrees), None, estimate)
    if bench.assume.counted:
        candidate = with_memory(bench, candidate)
    cap = bench.cluster.memory * (1 - bench.assume.reserve)
    if candidate.bytes > cap:
        over = (candidate.bytes - cap) / GIB
        return SearchResult([], [too_large(candidate.name, over)], 1)
    return SearchResult([candidate], [], 1)


def memory_values(candidate: Candidate) -> Values:
    """Bytes by what they are for; one number where they were not counted."""
    memory = candidate.memory
    if memory is None:
        estimate = round(candidate.estimate)
        return {"estimated": estimate, "peak": estimate, "when": "estimated"}
    return asdict(memory)


def _row(each: Candidate, best: Candidate) -> Values:
    return {
        "layout": each.name, "options": describe_options(each.cfg), "seconds": each.step.seconds,
        "mfu": each.step.mfu, "slower": each.step.seconds / best.step.seconds - 1,
        "memory": memory_values(each), "overrides": overrides_of(each.cfg),
    }  # fmt: skip


def _buckets(stage: StageWork, best: Candidate) -> list[Values]:
    rows = []
    for share, time in zip(stage.micro_share, best.step.buckets, strict=True):
        work = time.work
        rows.append(
            {
                "name": work.bucket.name, "class": work.class_name, "tokens": work.tokens,
                "share": work.share, "clips": work.clips, "micro_batch_share": share,
                "tflop_a_clip": work.flops / 1e12,
                "tflop_a_micro_batch": work.clips * work.flops / 1e12,
                "seconds": time.total,
                "parts": {
                    "matrix products": time.products, "attention": time.attention,
                    "norms and gates": time.passes, "computed again": time.recompute,
                    "frozen encoders": time.video + time.text, "copies, host": time.copies + time.host,
                    "token exchange": time.exchange + time.ring, "offload": time.offload,
                },
            }
        )  # fmt: skip
    return rows


def _saves(bench: Bench, best: Candidate) -> Values:
    cfg, assume, cluster = best.cfg, bench.assume, bench.cluster
    trained = trained_parameters(cfg)
    moments = moment_copies(cfg.optim, cfg.model, cfg.text)
    copies = 2 + len(cfg.ema.more) + len(cfg.ema.post_hoc) + moments
    total = 4.0 * trained * copies
    shards = best.degrees.shards if cfg.parallel.engine == "fsdp" else cluster.gpus
    stall = SAVE_SECONDS + total / shards / (cluster.gpu.host_gb_s * GB)
    move = total / (assume.storage_gb_s * GB)
    mtbf = 3600 * cluster.gpu.mtbf_hours / cluster.gpus
    saves = schedule(mtbf, stall, move, 60 * assume.restart_minutes + move)
    return {
        **asdict(saves),
        "gb": total / GB,
        "every": max(1, round(saves.interval / best.step.seconds)),
        "sync_every": max(1, round(saves.sync_interval / best.step.seconds)),
    }
