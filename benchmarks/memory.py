"""`sora bench memory`: what each memory option saves and costs, and how long a clip then fits.

One card, one model, one clip: forward and backward with each option on the same weights. On a GPU blocks
are compiled as a run compiles them, and the numbers are the allocator's peak, model FLOPs utilisation and
the longest clip that trains; on a CPU they are counted from the storages that are alive, at any size, so
the same table can be made at a desk. How long a clip fits is asked of an attention that keeps what
attention keeps and computes nothing. What was measured is on disk after each option.
"""

import argparse
import gc
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.model import (
    DEFAULT_OUT,
    Batch,
    ModelBenchRequest,
    batch_of,
    clip_flops,
    model_of,
    on_meta,
)
from benchmarks.stub_attention import stubbed
from sora_train.config import Config, ModelConfig, ParallelConfig, TextConfig
from sora_train.device import measuring
from sora_train.device.measuring import Measured, Result, Stats
from sora_train.errors import UserError
from sora_train.models.memory import fixed_bytes, transformer_parameters
from sora_train.models.transformer.attention_backends import prepare_attention
from sora_train.models.transformer.dit import VideoDiT
from sora_train.monitoring.device_peaks import peak_flops
from sora_train.parallel.compile import resolve_compile
from sora_train.parallel.materialise import materialise
from sora_train.parallel.memory.activations import prepare_blocks
from sora_train.parallel.memory.offload import Offloader
from sora_train.parallel.shards import local
from sora_train.runtime.world import grow_segments, pick_device

OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "memory budget 0.7": {"activation_memory_budget": 0.7},
    "memory budget 0.5": {"activation_memory_budget": 0.5},
    "selective": {"activation_checkpointing": "selective"},
    "selective, attention": {
        "activation_checkpointing": "selective", "checkpoint_keep": ("attention",),
    },
    "full, every 2nd": {"activation_checkpointing": "full", "checkpoint_every": 2},
    "full": {"activation_checkpointing": "full"},
    "mlp in 4": {"mlp_chunks": 4},
    "offload": {"offload_activations": True},
    "full, offload": {"activation_checkpointing": "full", "offload_activations": True},
    "full, mlp in 4, offload": {
        "activation_checkpointing": "full", "mlp_chunks": 4, "offload_activations": True,
    },
}  # fmt: skip
MIB = 2**20
START = 16_384
"""Tokens from which the longest clip is looked for on a GPU."""
Facts = dict[str, str | int | float | None]


class LiveBytes(TorchDispatchMode):
    """Counts bytes of the storages made inside the block that are alive: `now`, and at most, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {
            local(x).untyped_storage()._cdata
            for x in tree_leaves((args, kwargs))
            if isinstance(x, Tensor)
        }
        found = func(*args, **(kwargs or {}))
        for made in tree_leaves(found):
            if isinstance(made, Tensor) and made.device.type != "meta":
                storage = local(made).untyped_storage()
                if storage._cdata not in inputs:
                    self._count(storage)
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._alive:
            return

        def gone(_: object) -> None:
            if self._alive.pop(address, None) is not None:
                self.now -= size

        self._alive[address] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Wanted:
    """What to measure, and the bytes that a clip may take on a CPU, whose memory is not the question."""

    request: ModelBenchRequest
    dtype: torch.dtype
    options: tuple[str, ...]
    longest: bool
    budget: float
    fits: int = 0
    """A number of tokens of which is asked whether a clip of them trains, 0: none."""


def main(arguments: Sequence[str]) -> int:
    """Run `[model overrides] [--tokens N] ...`, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sora bench memory", allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=ModelBenchRequest.tokens, help="video tokens")
    parser.add_argument(
        "--caption", type=int, default=ModelBenchRequest.caption, help="caption tokens"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--options", default="all", help="names of options, parted by ';'")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--longest", action="store_true", help="look for the longest clip too")
    parser.add_argument("--fits", type=int, default=0, help="whether a clip of N tokens trains")
    parser.add_argument("--budget-mib", type=float, default=0.0, help="with --longest on a CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of memory.json, .md")
    options, overrides = parser.parse_known_args(list(arguments))
    names = chosen_options(options.options)
    wrong = [name for name in names if name not in OPTIONS]
    if wrong:
        raise UserError(f"--options {wrong[0]!r} is not one of {'; '.join(OPTIONS)}")
    if min(options.tokens, options.caption, options.repeats) < 1:
        raise UserError("--tokens, --caption and --repeats must be at least 1")
    request = ModelBenchRequest(
        model_of(overrides),
        tokens=options.tokens,
        caption=options.caption,
        repeats=options.repeats,
        device=options.device,
    )
    wanted = Wanted(
        request, getattr(torch, options.dtype), names, options.longest, options.budget_mib * MIB, options.fits,
    )  # fmt: skip
    path = run(wanted, options.out)
    print(path.with_suffix(".md").read_text())
    print(f"wrote {path} and {path.with_suffix('.md')}")
    return 0


def chosen_options(text: str) -> tuple[str, ...]:
    """Names parted by ';', or all of them."""
    return tuple(OPTIONS) if text == "all" else tuple(text.split(";"))


def run(wanted: Wanted, out: Path) -> Path:
    """Measure option by option and write `out`/memory.json and memory.md after each.

    Raises:
        UserError: something asked for is not on this machine.
    """
    grow_segments()
    device = pick_device(wanted.request.device)
    prepare_attention(wanted.request.model, device, wanted.dtype)
    if (wanted.longest or wanted.fits) and device.type == "cpu" and not wanted.budget:
        raise UserError(
            "--longest and --fits on a CPU need --budget-mib, the memory that a clip may take"
        )
    cfg = wanted.request.model
    measured: dict[str, Measured] = {}
    facts: Facts = {
        "tokens": wanted.request.tokens,
        "caption tokens": wanted.request.caption,
        "dtype": str(wanted.dtype).removeprefix("torch."),
        "device": str(device),
        "parameters": sum(p.numel() for p in on_meta(cfg).parameters()),
    }
    result = Result("memory", measured, facts)
    weights = first_weights(cfg, wanted.dtype, device)
    compiled = resolve_compile(cfg.compile, device) != "off"
    for name in wanted.options:
        if "activation_memory_budget" in OPTIONS[name] and not compiled:
            facts[f"not measured, {name}"] = "blocks are not compiled"
            continue
        measure_option(wanted, name, weights, device, result)
        result.write(out)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result.write(out)


def measure_option(
    wanted: Wanted, name: str, weights: dict[str, Tensor], device: torch.device, result: Result
) -> None:
    """Seconds of a step, bytes, MFU and what fits into `result`."""
    request, facts = wanted.request, result.facts
    model, offloader = built(request.model, OPTIONS[name], weights, device)
    batch = batch_of(request, wanted.dtype, device)
    step = step_of(model, batch)
    try:
        # The first step compiles.
        step()
        peak, saved = peak_of(model, batch, device, offloader)
    except torch.OutOfMemoryError:
        facts[f"peak MiB, {name}"] = "out of memory"
        return ask_what_fits(wanted, name, weights, device, facts)
    facts[f"peak MiB, {name}"] = peak / MIB
    if saved is not None:
        facts[f"saved for backward MiB, {name}"] = saved / MIB
    seconds = []
    for _ in range(request.repeats):
        measuring.synchronize()
        began = time.perf_counter()
        step()
        measuring.synchronize()
        seconds.append(time.perf_counter() - began)
    taken = Stats.of(seconds)
    result.measured[f"step, {name}"] = Measured(taken, "s")
    if device.type == "cuda":
        peak_rate = peak_flops(torch.cuda.get_device_name(device))
        flops = clip_flops(request)
        facts[f"MFU, {name}"] = flops / taken.median / peak_rate if peak_rate else None
    del model, step, batch
    ask_what_fits(wanted, name, weights, device, facts)


def ask_what_fits(
    wanted: Wanted, name: str, weights: dict[str, Tensor], device: torch.device, facts: Facts
) -> None:
    """The longest clip that trains, and whether one of `wanted.fits` tokens does, beside the rest of a run's state."""
    if not (wanted.longest or wanted.fits):
        return
    with stubbed():
        model, offloader = built(wanted.request.model, OPTIONS[name], weights, device)
        rest = state_beside(wanted, device)

        def fitting(tokens: int) -> bool:
            return fits(wanted, tokens, model, device, offloader)

        if wanted.fits:
            facts[f"{wanted.fits} tokens, {name}"] = (
                "trains" if fitting(wanted.fits) else "too long"
            )
        if wanted.longest:
            first = START if device.type == "cuda" else 64
            facts[f"longest clip in tokens, {name}"] = longest(fitting, first, first)
        del rest


def first_weights(cfg: ModelConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Weights of all options, drawn once where they are used: small normal numbers, since sizes and not values are
    measured."""
    draws = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, value in on_meta(cfg).state_dict().items():
        if value.is_floating_point():
            weights[name] = torch.empty(value.shape, dtype=dtype, device=device).normal_(
                0, 0.02, generator=draws
            )
    return weights


def built(
    cfg: ModelConfig, option: dict[str, Any], weights: dict[str, Tensor], device: torch.device
) -> tuple[VideoDiT, Offloader | None]:
    """The transformer with one option on these weights, which it does not copy."""
    whole = Config()
    parallel = whole.parallel.model_copy(update=option)
    whole = whole.model_copy(update={"model": cfg, "parallel": parallel})
    model = on_meta(cfg)
    materialise(model, device)
    missing = model.load_state_dict(weights, strict=False, assign=True).missing_keys
    assert not missing, missing
    # `assign` takes the tensors as they are: parameters that ask for gradients again.
    model.requires_grad_(True)
    _, offloader = prepare_blocks(model, whole, device)
    return model, offloader


def step_of(model: VideoDiT, batch: Batch) -> Callable[[], None]:
    def step() -> None:
        velocity = model(batch.latents, batch.t, batch.captions)
        velocity.backward(batch.cotangent.to(velocity.dtype))
        model.zero_grad(set_to_none=True)

    return step


def peak_of(
    model: VideoDiT, batch: Batch, device: torch.device, offloader: Offloader | None
) -> tuple[float, float | None]:
    """Bytes at the height of a step, and, counted on a CPU, those alive between forward and backward; there the
    weights are left out and what is offloaded is not counted as saved."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step_of(model, batch)()
        measuring.synchronize()
        return float(torch.cuda.max_memory_allocated(device)), None
    before = offloader.bytes_moved if offloader else 0
    with LiveBytes() as live:
        velocity = model(batch.latents, batch.t, batch.captions)
        host = offloader.bytes_moved - before if offloader else 0
        saved = live.now - host
        live.peak = live.now
        velocity.backward(batch.cotangent.to(velocity.dtype))
        peak = live.peak - host
    model.zero_grad(set_to_none=True)
    return float(peak), float(saved)


def longest(fitting: Callable[[int], bool], start: int = 64, step: int = 64) -> int:
    """The most tokens that fit, to within an eighth: doubled until they do not, then bisected; 0 if none do."""
    good, bad = 0, start
    while fitting(bad):
        good, bad = bad, 2 * bad
    while bad - good > max(step, good // 8):
        middle = (good + bad) // 2 // step * step
        if middle <= good:
            break
        good, bad = (middle, bad) if fitting(middle) else (good, middle)
    return good


def state_beside(wanted: Wanted, device: torch.device) -> Tensor | None:
    """On a GPU, the memory that training takes beside clips and the weights and gradients that are here: masters,
    moments, an average."""
    if device.type == "cpu":
        return None
    cfg, w = wanted.request.model, wanted.dtype.itemsize
    text = TextConfig(trainable=False, d_model=cfg.text_dim)
    fixed = fixed_bytes(cfg, text, ParallelConfig(), w=w, moments=2, micro_batches=1)
    here = 2 * w * transformer_parameters(cfg)[0]
    return torch.empty(int(fixed - here), dtype=torch.uint8, device=device)


def fits(
    wanted: Wanted, tokens: int, model: VideoDiT, device: torch.device, offloader: Offloader | None
) -> bool:
    """Whether a step on a clip of so many tokens has room."""
    request = ModelBenchRequest(wanted.request.model, tokens=tokens, caption=wanted.request.caption)
    try:
        batch = batch_of(request, wanted.dtype, device)
        peak, _ = peak_of(model, batch, device, offloader)
    except torch.OutOfMemoryError:
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        return False
    return device.type == "cuda" or peak <= wanted.budget
