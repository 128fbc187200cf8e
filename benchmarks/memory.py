"""`sora bench memory`: what each memory option saves and costs, and how long a clip then fits.

One card, one model, one clip: forward and backward with each option on the same weights. On a GPU the
numbers are the allocator's peak, model FLOPs utilisation and the longest clip that trains; on a CPU they
are counted from the storages that are alive, at any size, so the same table can be made at a desk.
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
from sora_train.config import Config, ModelConfig, ParallelConfig, TextConfig
from sora_train.errors import UserError
from sora_train.models.memory import fixed_bytes, transformer_parameters
from sora_train.models.transformer.attention_backends import prepare_attention
from sora_train.models.transformer.dit import VideoDiT
from sora_train.monitoring.device_peaks import peak_flops
from sora_train.parallel.materialise import fill, materialise
from sora_train.parallel.memory.activations import prepare_blocks
from sora_train.parallel.memory.offload import Offloader
from sora_train.parallel.shards import local
from sora_train.runtime.world import grow_segments, pick_device
from sora_train.tools.measuring import Measured, Result, Stats

OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
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
    parser.add_argument("--budget-mib", type=float, default=0.0, help="with --longest on a CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of memory.json, .md")
    options, overrides = parser.parse_known_args(list(arguments))
    names = tuple(OPTIONS) if options.options == "all" else tuple(options.options.split(";"))
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
        request, getattr(torch, options.dtype), names, options.longest, options.budget_mib * MIB
    )
    path = run(wanted).write(options.out)
    print(path.with_suffix(".md").read_text())
    print(f"wrote {path} and {path.with_suffix('.md')}")
    return 0


def run(wanted: Wanted) -> Result:
    """Measure every option. Raises UserError where something asked for is not on this machine."""
    grow_segments()
    device = pick_device(wanted.request.device)
    prepare_attention(wanted.request.model, device, wanted.dtype)
    if wanted.longest and device.type == "cpu" and not wanted.budget:
        raise UserError("--longest on a CPU needs --budget-mib, the memory that a clip may take")
    cfg = wanted.request.model
    measured: dict[str, Measured] = {}
    facts: dict[str, str | int | float | None] = {
        "tokens": wanted.request.tokens,
        "caption tokens": wanted.request.caption,
        "dtype": str(wanted.dtype).removeprefix("torch."),
        "device": str(device),
        "parameters": sum(p.numel() for p in on_meta(cfg).parameters()),
    }
    for name in wanted.options:
        measure_option(wanted, name, device, measured, facts)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return Result("memory", measured, facts)


def measure_option(
    wanted: Wanted,
    name: str,
    device: torch.device,
    measured: dict[str, Measured],
    facts: dict[str, str | int | float | None],
) -> None:
    """Seconds of a step into `measured`; bytes, MFU and the longest clip into `facts`."""
    request = wanted.request
    model, offloader = built(request.model, OPTIONS[name], wanted.dtype, device)
    batch = batch_of(request, wanted.dtype, device)
    step = step_of(model, batch)
    peak, saved = peak_of(model, batch, device, offloader)
    facts[f"peak MiB, {name}"] = peak / MIB
    if saved is not None:
        facts[f"saved for backward MiB, {name}"] = saved / MIB
    seconds = []
    for _ in range(request.repeats):
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    taken = Stats.of(seconds)
    measured[f"step, {name}"] = Measured(taken, "s")
    if device.type == "cuda":
        flops = clip_flops(request)
        peak_rate = peak_flops(torch.cuda.get_device_name(device))
        facts[f"MFU, {name}"] = flops / taken.median / peak_rate if peak_rate else None
    if wanted.longest:
        rest = state_beside(wanted, device)
        facts[f"longest clip in tokens, {name}"] = longest(
            lambda tokens: fits(wanted, tokens, model, device, offloader)
        )
        del rest


def built(
    cfg: ModelConfig, option: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[VideoDiT, Offloader | None]:
    """The transformer with one option, filled weight by weight, its output layer not at zero."""
    whole = Config()
    whole = whole.model_copy(
        update={
            "model": cfg.model_copy(update={"compile": "off"}),
            "parallel": whole.parallel.model_copy(update=option),
        }
    )
    model = on_meta(cfg)
    materialise(model, device)
    fill(model, model.initial_values(seed=0))
    torch.nn.init.normal_(model.proj_out.weight, std=0.02)
    _, offloader = prepare_blocks(model, whole, device)
    return model.to(dtype), offloader


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
        synchronize(device)
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


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
