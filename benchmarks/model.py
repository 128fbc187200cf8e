"""`sora bench model`: forward and backward of our transformer and of diffusers' WanTransformer3DModel.

The same weights, the same clip, one run, the contestants taking turns so that a busy machine slows all of
them alike. Ours has its weights in the dtype, as training computes with them, and is compiled if asked
for. Diffusers' is what `from_pretrained(torch_dtype=)` makes, with norms and the noise level in float32, and
always eager. Ours is measured with the attention the config asks for and, where that is another, with
PyTorch's SDPA, which is what diffusers calls: the first ratio is what a run gains, the second what it
gains besides attention. With one thread on a CPU its own time counts, to which other programs add little.
`kernels alone` are the matrix products and the attention of ours and nothing else:
a floor for what is around them.
"""

import argparse
import gc
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from sora_train.config import Config, ModelConfig
from sora_train.config.compose import compose
from sora_train.device.measuring import Measured, Result, Stats, grid_of
from sora_train.errors import UserError
from sora_train.models.flops import training_flops
from sora_train.models.transformer.attention_backends import (
    attend,
    describe,
    prepare_attention,
    resolve,
)
from sora_train.models.transformer.cpu_kernels import (
    DEFAULT,
    ShapeClass,
    choose,
    clock,
    in_use,
    use,
)
from sora_train.models.transformer.cpu_trials import step_of as trial_of
from sora_train.models.transformer.dit import VideoDiT
from sora_train.models.transformer.layers import linear
from sora_train.models.transformer.wan_layout import wan_arguments
from sora_train.monitoring.device_peaks import peak_flops
from sora_train.parallel.compile import check_compiler, compile_blocks, graphs_compiled
from sora_train.runtime.world import pick_device

DEFAULT_OUT = Path("benchmarks/results")
DEFAULT_SIZES = {
    "num_layers": 8, "num_heads": 6, "head_dim": 64, "ffn_dim": 1536, "in_channels": 16, "text_dim": 512,
}  # fmt: skip
"""20 M parameters, heads of 64: what is measured where no model.* override is given."""
DTYPES = ("float32", "bfloat16")
MODES = ("eager", "dynamic", "static")
FLOOR = "kernels alone"


@dataclass(frozen=True)
class ModelBenchRequest:
    """What to measure: one clip of `tokens` and a caption of `caption` tokens."""

    model: ModelConfig
    tokens: int = 1024
    caption: int = 128
    dtypes: tuple[str, ...] = DTYPES
    modes: tuple[str, ...] = ("eager",)
    repeats: int = 7
    warmup: int = 1
    threads: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class Batch:
    """latents (1, C, T, H, W), one noise level for all frames, captions (1, S, E) and the gradient of the velocity."""

    latents: Tensor
    t: Tensor
    captions: Tensor
    cotangent: Tensor


def main(arguments: Sequence[str]) -> int:
    """Run `[model overrides] [--tokens N] ...`, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sora bench model", allow_abbrev=False)
    parser.add_argument("--tokens", type=int, default=ModelBenchRequest.tokens, help="video tokens")
    parser.add_argument(
        "--caption", type=int, default=ModelBenchRequest.caption, help="caption tokens"
    )
    parser.add_argument("--dtype", default=",".join(DTYPES), help="float32, bfloat16 or both")
    parser.add_argument("--modes", default="eager", help="of eager, dynamic, static")
    parser.add_argument("--repeats", type=int, default=ModelBenchRequest.repeats)
    parser.add_argument("--warmup", type=int, default=ModelBenchRequest.warmup)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: one a core")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of model.json, .md")
    options, overrides = parser.parse_known_args(list(arguments))
    request = ModelBenchRequest(
        model_of(overrides),
        tokens=options.tokens,
        caption=options.caption,
        dtypes=chosen("--dtype", options.dtype, DTYPES),
        modes=chosen("--modes", options.modes, MODES),
        repeats=options.repeats,
        warmup=options.warmup,
        threads=options.threads,
        device=options.device,
    )
    path = run(request).write(options.out)
    print(path.with_suffix(".md").read_text())
    print(f"wrote {path} and {path.with_suffix('.md')}")
    return 0


def chosen(flag: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The comma-separated words of an option. Raises UserError for one that is not known."""
    words = tuple(dict.fromkeys(word.strip() for word in text.split(",")))
    wrong = [word for word in words if word not in known]
    if wrong:
        raise UserError(f"{flag} {text}: '{wrong[0]}' is not one of {', '.join(known)}")
    return words


def model_of(overrides: Sequence[str]) -> ModelConfig:
    """The section model of the overrides, or the sizes of this benchmark; without extras that Wan lacks."""
    sized = any(text.partition("=")[0] in ("model", "experiment") for text in overrides)
    sizes = [] if sized else [f"model.{key}={value}" for key, value in DEFAULT_SIZES.items()]
    cfg: ModelConfig = compose([*sizes, *overrides, "tracker=none"]).config.model
    return cfg.model_copy(update={"mask_channel": False, "fps_embed": False})


def run(request: ModelBenchRequest) -> Result:
    """Measure everything that was asked for.

    Raises:
        UserError: nothing to measure, or something asked for is not on this machine.
    """
    if min(request.tokens, request.caption, request.repeats) < 1 or request.warmup < 0:
        raise UserError(
            f"--tokens {request.tokens} --caption {request.caption} --repeats {request.repeats} --warmup "
            f"{request.warmup}: all but the last must be at least 1"
        )
    device = pick_device(request.device)
    torch.set_num_threads(request.threads or os.cpu_count() or 1)
    for dtype in request.dtypes:
        prepare_attention(request.model, device, getattr(torch, dtype))
    for mode in request.modes:
        compiled = request.model.model_copy(update={"compile": "off" if mode == "eager" else mode})
        check_compiler(Config().model_copy(update={"model": compiled}), device)
    measured: dict[str, Measured] = {}
    facts: dict[str, str | int | float | None] = {
        "tokens": request.tokens,
        "caption tokens": request.caption,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "load when done": None,
        "parameters": sum(p.numel() for p in on_meta(request.model).parameters()),
        "GFLOP a token": clip_flops(request) / request.tokens / 1e9,
    }
    before = graphs_compiled()
    for dtype in request.dtypes:
        for mode in request.modes:
            compare(request, dtype, mode, device, measured, facts)
    facts["graphs compiled"] = graphs_compiled() - before
    facts["load when done"] = first_load()
    return Result("model", measured, facts)


def clip_flops(request: ModelBenchRequest) -> int:
    """Operations of training on the clip of `batch_of`, forward and backward."""
    frames = grid_of(request.tokens)[0]
    return training_flops(request.model, None, request.tokens, frames, request.caption)


def compare(
    request: ModelBenchRequest,
    dtype: str,
    mode: str,
    device: torch.device,
    measured: dict[str, Measured],
    facts: dict[str, str | int | float | None],
) -> None:
    """One dtype in one mode: tokens/s of each contestant into `measured`, their ratios into `facts`."""
    batch = batch_of(request, getattr(torch, dtype), device)
    steps = contestants(request, getattr(torch, dtype), mode, device, batch)
    seconds = take_turns(
        steps,
        request.warmup,
        request.repeats,
        clock() if device.type == "cpu" else time.perf_counter,
    )
    label = f"{mode}, {dtype}"
    facts[f"attention of ours, {dtype}"] = describe(
        request.model, device, getattr(torch, dtype), masked_captions=False
    )
    if dtype == "bfloat16" and device.type == "cpu":
        facts["kernels of bfloat16"] = str(in_use())
    speed = {name: request.tokens / Stats.of(taken).median for name, taken in seconds.items()}
    for name, taken in seconds.items():
        rates = Stats.of([request.tokens / second for second in taken])
        measured[f"{name}, {label}"] = Measured(rates, "tokens/s")
        if name != "diffusers":
            facts[f"{name} / diffusers, {label}"] = speed[name] / speed["diffusers"]
        if device.type == "cuda":
            flops = speed[name] * float(facts["GFLOP a token"] or 0) * 1e9
            facts[f"TFLOP/s of {name}, {label}"] = flops / 1e12
            peak = peak_flops(torch.cuda.get_device_name(device))
            if peak and dtype == "bfloat16":
                facts[f"MFU of {name}, {label}"] = flops / peak
            facts[f"peak GiB of {name}, {label}"] = peak_memory(steps[name], device)
    facts[f"share of ours that is not kernels, {label}"] = 1 - speed["ours"] / speed[FLOOR]
    gc.collect()


def choose_kernels(request: ModelBenchRequest, dtype: torch.dtype, device: torch.device) -> None:
    """Compute from now on as a run does that begins on this machine with clips of this size."""
    cfg = request.model
    use(DEFAULT)
    if dtype == torch.bfloat16 and device.type == "cpu" and cfg.attention == "auto":
        shape = ShapeClass.of(1, request.tokens, cfg.num_heads, cfg.head_dim, cfg.ffn_dim)
        use(choose(shape, trial_of))


def contestants(
    request: ModelBenchRequest, dtype: torch.dtype, mode: str, device: torch.device, batch: Batch
) -> dict[str, Callable[[], None]]:
    """A forward and backward pass of each, by name. They share the same first weights."""
    choose_kernels(request, dtype, device)
    cfg = request.model
    ours = {"ours": cfg}
    if resolve(cfg.attention, device, dtype) != ("sdpa", dtype):
        ours["ours with the same sdpa"] = cfg.model_copy(update={"attention": "sdpa"})
    weights = first_weights(cfg)
    steps = {}
    for name, changed in ours.items():
        model = VideoDiT(changed)
        model.load_state_dict(weights)
        model = model.to(device, dtype)
        compile_blocks(model, "off" if mode == "eager" else mode)
        steps[name] = step_of(model, lambda m: m(batch.latents, batch.t, batch.captions), batch)
    steps[FLOOR] = kernels_alone(request, dtype, device)
    level = batch.t[:, 0] * 1000
    steps["diffusers"] = step_of(
        diffusers_model(cfg, weights, dtype).to(device),
        lambda m: m(batch.latents, level, batch.captions, return_dict=False)[0],
        batch,
    )
    return steps


def diffusers_model(
    cfg: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype
) -> WanTransformer3DModel:
    """As its users get it: read from files, which keeps some parts in float32 whatever the dtype."""
    wan = WanTransformer3DModel(**wan_arguments(cfg))
    wan.load_state_dict(weights)
    with tempfile.TemporaryDirectory() as folder:
        wan.save_pretrained(folder)
        wan = WanTransformer3DModel.from_pretrained(folder, torch_dtype=dtype)
    return wan.train()


def kernels_alone(
    request: ModelBenchRequest, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """Forward and backward of every large matrix product and attention of the model, on random numbers."""
    cfg = request.model
    tokens, caption, dim = request.tokens, request.caption, cfg.dim
    pixels = math.prod(cfg.patch_size)
    block = [(tokens, dim, dim)] * 6 + [(caption, dim, dim)] * 2
    block += [(tokens, dim, cfg.ffn_dim), (tokens, cfg.ffn_dim, dim)]
    ends = [(tokens, cfg.in_channels * pixels, dim), (tokens, dim, cfg.velocity_channels * pixels)]
    ends += [(caption, cfg.text_dim, dim), (caption, dim, dim)]
    draws = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws).to(device, dtype).requires_grad_()

    operands = {
        size: [normal(size[0], size[1]), normal(size[2], size[1]), normal(size[2])]
        for size in {*block, *ends}
    }
    heads = cfg.num_heads, cfg.head_dim
    attended = [[normal(1, n, *heads) for n in (tokens, keys, keys)] for keys in (tokens, caption)]

    def step() -> None:
        for size in [*block * cfg.num_layers, *ends]:
            y = linear(*operands[size])
            torch.autograd.grad(y, operands[size], y.detach())
        for q, k, v in attended * cfg.num_layers:
            y = attend(cfg.attention, q, k, v, None)
            torch.autograd.grad(y, (q, k, v), y.detach())

    return step


def step_of(model: nn.Module, forward: Callable[[Any], Tensor], batch: Batch) -> Callable[[], None]:
    def step() -> None:
        velocity = forward(model)
        velocity.backward(batch.cotangent.to(velocity.dtype))
        model.zero_grad(set_to_none=True)

    return step


def take_turns(
    steps: dict[str, Callable[[], None]],
    warmup: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each, one after another in turns, after `warmup` rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + repeats):
        for name, step in steps.items():
            synchronize()
            began = clock()
            step()
            synchronize()
            if turn >= warmup:
                seconds[name].append(clock() - began)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(step: Callable[[], None], device: torch.device) -> float:
    """GiB at the height of one more step; the weights of all contestants are among them."""
    torch.cuda.reset_peak_memory_stats(device)
    step()
    synchronize()
    return torch.cuda.max_memory_allocated(device) / 2**30


def batch_of(request: ModelBenchRequest, dtype: torch.dtype, device: torch.device) -> Batch:
    """A random clip of `tokens` tokens, the same for the same request."""
    cfg = request.model
    frames, rows, columns = grid_of(request.tokens)
    _, p, q = cfg.patch_size
    draws = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws).to(device, dtype)

    size = frames, rows * p, columns * q
    return Batch(
        latents=normal(1, cfg.in_channels, *size),
        t=torch.full((1, frames), 0.5, device=device),
        captions=normal(1, request.caption, cfg.text_dim),
        cotangent=normal(1, cfg.velocity_channels, *size),
    )


def first_weights(cfg: ModelConfig) -> dict[str, Tensor]:
    """Weights as training begins, but for an output layer that is not zero: all gradients flow."""
    weights = dict(VideoDiT(cfg).initial_values(seed=0))
    shape = weights["proj_out.weight"].shape
    weights["proj_out.weight"] = 0.02 * torch.randn(
        shape, generator=torch.Generator().manual_seed(1)
    )
    return weights


def on_meta(cfg: ModelConfig) -> VideoDiT:
    with torch.device("meta"):
        return VideoDiT(cfg)


def first_load() -> str:
    """Load of the machine over the last minute, where it is known."""
    text = Path("/proc/loadavg")
    return text.read_text().split()[0] if text.exists() else "not known"
