"""The card printed before step 1: what will be trained, on what, at what cost."""

import time

import torch
from rich.table import Table

from sora_train.base.console import plain_console
from sora_train.base.progress import duration
from sora_train.checkpoint.meta import TrainState
from sora_train.checkpoint.space import Space
from sora_train.data.decode.probe import traits_told
from sora_train.data.exclusion import EXCLUDED
from sora_train.data.loader import backend_of
from sora_train.data.tape.tape import nearby_efficiencies, row_costs, slot_efficiency
from sora_train.models.adapters.inject import DOWN, adapter_weights, base_weights
from sora_train.models.text.lengths import CaptionLengths
from sora_train.models.transformer.attention_backends import describe
from sora_train.models.transformer.cpu_kernels import in_use
from sora_train.parallel.checks.self_test import Agreed
from sora_train.parallel.compile import resolve_compile
from sora_train.parallel.degrees import Degrees, describe_layout
from sora_train.parallel.protocol import Engine
from sora_train.parallel.shards import local
from sora_train.runtime.world import allocator
from sora_train.training.components import Components
from sora_train.training.kernels import is_open
from sora_train.training.pipeline.data import TrainingData, mean_step
from sora_train.training.run import RunContext

# Share of a plain matrix product's speed that training steps were seen to reach on CPUs and GPUs.
ASSUMED_UTILISATION = 0.4


def print_card(
    run: RunContext, parts: Components, state: TrainState, space: Space, self_tested: Agreed | None
) -> None:
    """Parameters, clips by bucket, drops by reason, batch, epochs, memory and expected time; the first rank alone."""
    if not run.is_main:
        return
    console = plain_console()
    console.print(run_table(run, parts, state, space, self_tested))
    console.print(bucket_table(parts.data, state.data_step))
    for reason, count in sorted(parts.data.assignment.dropped().items()):
        console.print(f"dropped: {count} clips ({reason})")
        for detail in details(parts.data, reason):
            console.print(f"  {detail}", style="dim")
    data = run.cfg.data
    for line in traits_told(parts.data.manifest, data.alpha_background, backend_of(data)):
        console.print(line)


def run_table(
    run: RunContext, parts: Components, state: TrainState, space: Space, self_tested: Agreed | None
) -> Table:
    cfg, data, part = run.cfg, parts.data, parts.data.part(state.data_step)
    clips, tokens, flops = mean_step(data, state.data_step)
    table = Table(title=f"{cfg.name} -> {run.folder.path}", show_header=False, title_justify="left")
    left = cfg.train.steps - state.step
    rows = {
        "trainable parameters": f"{parts.num_params:,}",
        **adapter_row(run, parts),
        "device": f"{run.world.device}, {run.world.size} rank(s), {torch.get_num_threads()} thread(s)",
        "layout": describe_layout(cfg.parallel.engine, run.degrees),
        "steps": f"{state.step} -> {cfg.train.steps}" + (" (resumed)" if state.step else ""),
        "a step": f"{cfg.train.micro_batches} micro-batch(es), {clips:.1f} clips, {tokens:,.0f} tokens on average",
        "an epoch": f"{part.clips_per_epoch:,} clips, {part.per_epoch / data.micro_batches:.1f} steps; "
        f"the run is {data.epoch_at(cfg.train.steps):.1f} epochs",
        "ranks at work": busy_ranks(run, data, state.data_step),
        **shared_clips(run.degrees),
        **{
            f"clips{name}": f"{account['used']:,} used + {account['dropped']:,} dropped + {account['failed']:,} "
            f"failed before = {account['total']:,}"
            for name, account in accounts(data).items()
        },
        **joining(data),
        "held-out clips": str(len(data.val_clips)),
        **caption_row(run, data),
        **model_rows(run, parts.engine, tokens / max(clips, 1), flops / max(tokens, 1)),
        **memory_rows(run),
        **({"self-test": str(self_tested)} if self_tested else {}),
        "memory of weights and optimizer": f"{state_bytes(run, parts) / 2**20:,.0f} MiB a rank",
        "checkpoints": space.row(),
        "expected time": f"about {duration(left * step_seconds(run, parts, state.data_step))} for {left} steps",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def adapter_row(run: RunContext, parts: Components) -> dict[str, str]:
    """What is trained beside which frozen base."""
    cfg = run.cfg.adapter
    if not cfg.on or parts.model is None:
        return {}
    layers = sum(name.endswith(DOWN) for name in adapter_weights(parts.model))
    frozen = sum(value.numel() for value in base_weights(parts.engine.model).values())
    kind = "DoRA" if cfg.dora else "LoRA"
    text = ", its text encoder too" if run.cfg.text.trainable else ""
    return {
        "adapter": f"{kind} of rank {cfg.rank} on {layers} layers; the {frozen:,} values of {run.cfg.init.run} are "
        f"frozen{text}"
    }


def memory_rows(run: RunContext) -> dict[str, str]:
    """The memory options that are on, and on a GPU the allocator's settings; docs/memory.md."""
    parallel, memory = run.cfg.parallel, run.cfg.memory
    kept = " and ".join(parallel.checkpoint_keep) or "nothing"
    which = (
        f"one block in {parallel.checkpoint_every}" if parallel.checkpoint_every > 1 else "blocks"
    )
    recomputed = {
        "none": "",
        "full": f"{which} computed again in backward",
        "selective": f"{which} computed again in backward but for {kept}",
    }[parallel.activation_checkpointing]
    budget = parallel.activation_memory_budget
    options = [
        recomputed,
        f"{budget:.0%} of what compiled blocks would keep" if budget < 1 else "",
        "activations on the host" if parallel.offload_activations else "",
        f"MLPs in {parallel.mlp_chunks} parts" if parallel.mlp_chunks > 1 else "",
        "moments on the host" if parallel.offload_optimizer else "",
        "weights on the host" if parallel.offload_params else "",
        f"frozen matrices in {memory.base}" if memory.base != "compute" else "",
        f"{memory.swap_blocks} blocks swapped with the host" if memory.swap_blocks else "",
        "encoders on the host" if memory.encode_first else "",
    ]
    options_on = ", ".join(option for option in options if option)
    rows = {"memory saved by": options_on} if options_on else {}
    if run.world.device.type == "cuda":
        rows["allocator"] = allocator()
    return rows


def model_rows(run: RunContext, engine: Engine, tokens: float, flops: float) -> dict[str, str]:
    """`flops` a token in clips of `tokens` on average, the attention kernel, and compilation; {} for a VAE."""
    cfg = run.cfg
    if cfg.task != "text_to_video":
        return {}
    dtype = getattr(engine, "param_dtype", torch.float32)
    masked = cfg.text.padding == "masked"
    return {
        "a token": f"{flops / 1e9:.3g} GFLOP forward and backward, in clips of {tokens:,.0f} tokens",
        "attention": describe(cfg.model, run.world.device, dtype, masked_captions=masked),
        **({"products": f"float8 {cfg.model.float8}"} if cfg.model.float8 != "off" else {}),
        **({"kernels": f"{in_use()} (of this CPU)"} if is_open(run) else {}),
        "compiled": "no (zero3 gathers weights inside a block)"
        if cfg.parallel.engine == "zero3"
        else compiled(cfg.model.compile, run.world.device),
    }


def caption_row(run: RunContext, data: TrainingData) -> dict[str, str]:
    """The share of captions that the text encoder does not read to their end; {} for a VAE."""
    if run.cfg.task != "text_to_video":
        return {}
    main = data.manifest.caption[data.assignment.bucket_of_row >= 0]
    captions = [caption for caption in main.tolist() if caption]
    return {"captions": CaptionLengths(run.cfg.text).share_cut(captions)}


def compiled(setting: str, device: torch.device) -> str:
    mode = resolve_compile(setting, device)
    text = "no" if mode == "off" else f"every block, {mode}"
    return f"{text} (chosen by auto)" if setting == "auto" else text


def shared_clips(degrees: Degrees) -> dict[str, str]:
    """Over how many ranks a clip's tokens are cut, where they are."""
    if degrees.cp == 1:
        return {}
    return {
        "a clip": f"its tokens are cut over {degrees.cp} ranks, ulysses {degrees.ulysses} x ring {degrees.ring}"
    }


def accounts(data: TrainingData) -> dict[str, dict[str, int]]:
    """The account of all clips, and where there are several sources that of each, by what is put behind "clips"."""
    rows = {"": data.account()}
    if len(data.sources.names) > 1:
        rows |= {f" of {name}": own for name, own in data.account_by_source().items()}
    return rows


def joining(data: TrainingData) -> dict[str, str]:
    """What the sources have gained or lost since the run began, and from which step on that counts."""
    if not data.sources.change:
        return {}
    *_, before, now = data.sources.blocks
    *_, last, snapshot = data.sources.snapshots
    joined, left_out = snapshot.first / data.micro_batches, snapshot.excluded_from
    gained = now - before + len(set(last.excluded) - set(snapshot.excluded))
    lost = len(set(snapshot.excluded) - set(last.excluded))
    rows = {
        "new clips": f"{gained:,}, which join at the end of this epoch (step {joined:g})",
        "excluded clips": f"{lost:,} more, from step {left_out / data.micro_batches:g} on",
    }
    return {name: rows[name] for name, count in zip(rows, (gained, lost), strict=True) if count}


def busy_ranks(run: RunContext, data: TrainingData, data_step: int) -> str:
    """How much of the ranks' time the step's micro-batches fill, and what nearby world sizes would."""
    micro_batches, ranks = run.cfg.train.micro_batches, run.world.dp_size
    tape = data.part(data_step)
    steps = max(1, min(64, tape.per_epoch // micro_batches))
    costs = row_costs(
        tape, micro_batches, ranks, first_step=-(-tape.first // micro_batches), steps=steps
    )
    predicted = costs.sum() / (costs.max(axis=1).sum() * ranks)
    text = (
        f"{slot_efficiency(micro_batches, ranks):.0%} of the slots hold a micro-batch, "
        f"{predicted:.1%} of the time is work (predicted, first {steps} step(s))"
    )
    if micro_batches % ranks:
        text += f"; nearby: {nearby_efficiencies(micro_batches, ranks)}"
    elif tape.group % ranks:
        text += f"; data.group={tape.group} is no multiple of {ranks} ranks, so rows mix costs"
    return text


def bucket_table(data: TrainingData, data_step: int) -> Table:
    table = Table(title="buckets", title_justify="left")
    for column in ("frames x height x width", "clips", "tokens a clip", "clips a micro-batch"):
        table.add_column(column, justify="right")
    counts = data.assignment.clips_per_bucket(data.table)
    sizes = data.part(data_step).sizes
    for spec in data.table:
        count = counts.get(spec.bucket.name, 0)
        size = str(sizes.get(spec.bucket, "rests")) if count else "no clip fits"
        table.add_row(spec.bucket.name, f"{count:,}", str(data.tokens_of(spec.bucket)), size)
    return table


def details(data: TrainingData, reason: str) -> list[str]:
    """The first few dropped clips by name, so that a person can look at them."""
    manifest, reasons = data.manifest, data.assignment.reasons
    rows = [row for row in range(len(manifest)) if reasons[row] == reason][:3]
    why = "data.exclude names it" if reason == EXCLUDED else "see buckets"
    return [f"{manifest.key[row]}: {manifest.drop_detail[row] or why}" for row in rows]


def state_bytes(run: RunContext, parts: Components) -> float:
    """float32 weights, gradients and averages, over the ranks that share them, and what the optimizer (unless it is on
    the host) and an adapter's frozen base keep here.

    Counted on the model that is built, so it holds for every task and for a model of one's own; `models/memory.py`
    estimates from the sizes alone, activations and gathered weights included, before anything is built."""
    shards = run.world.size // run.degrees.dp_replicate
    kept = 0
    if not run.cfg.parallel.offload_optimizer:
        kept = sum(local(value).nbytes for value in parts.engine.optimizer_state().values())
    if run.cfg.adapter.on:
        kept += sum(local(value).nbytes for value in base_weights(parts.engine.model).values())
    return parts.num_params * 4 * (2 + len(parts.ema.shadows)) / shards + kept


def step_seconds(run: RunContext, parts: Components, data_step: int) -> float:
    """A guess from the model's FLOPs and the speed of one matrix product, measured now."""
    data = parts.data
    _, _, flops = mean_step(data, data_step)
    if not hasattr(parts.engine.model, "flops"):
        steps = data.part(data_step).per_epoch / data.micro_batches
        pixels = sum(
            spec.bucket.frames * spec.bucket.height * spec.bucket.width
            * data.assignment.clips_per_bucket(data.table).get(spec.bucket.name, 0)
            for spec in data.table
        )  # fmt: skip
        # Convolutions of constant resolution cost about two operations a weight and pixel of their level.
        flops = 3 * 2.0 * parts.num_params * pixels / parts.vae.spatial_factor**2 * 4 / steps
    speed = matmul_flops(run.world.device, parts.engine) * ASSUMED_UTILISATION
    return flops / run.world.size / speed


def matmul_flops(device: torch.device, engine: Engine) -> float:
    """Floating-point operations a second of a matrix product of the training precision."""
    size = 4096 if device.type == "cuda" else 768
    dtype = getattr(engine, "param_dtype", torch.float32)
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
