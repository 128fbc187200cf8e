"""One step of a tiny model in the run's own layout, compared with one process, before the run begins.

Every rank computes the whole step by itself as well: the micro-batches of all ranks one after the other on
the plain model, their gradients added up. What is compared is the loss, the gradient norm, and the
gradients of three parameters: one before the tokens are cut, one between, one behind.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sora_train.config import Config, ModelConfig
from sora_train.errors import Fault
from sora_train.models.transformer.dit import VideoDiT
from sora_train.parallel.degrees import Degrees, describe_layout
from sora_train.parallel.engine import build_engine
from sora_train.parallel.layout import Layout
from sora_train.parallel.shards import full
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Relative difference at most, by the dtype of compute; masters, and so gradients, are float32 in all three."""
COMPARED = (
    "patch_embedding.weight",
    "blocks.0.attn1.to_q.weight",
    "proj_out.weight",
)
LR = 1e4
"""Large, so that how far a weight moves tells its gradient to the last digits."""


@dataclass(frozen=True)
class Agreed:
    """How it went: the largest relative difference, and seconds."""

    layout: str
    largest: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.layout} agrees with one process to {self.largest:.0e} in {self.seconds:.1f} s"
        )


def check_at_start(cfg: Config, layout: Layout, control: ControlPlane) -> Agreed | None:
    """The self-test, unless it is off or there is only one process."""
    if control.world.size == 1 or not cfg.parallel.self_test:
        return None
    return self_test(cfg, layout, control)


def self_test(cfg: Config, layout: Layout, control: ControlPlane) -> Agreed:
    """Take the step; a collective of all ranks. Nothing of it stays: no draw, no group, no weight.

    Raises:
        Fault: they differ; names the layout, what differs and by how much.
    """
    began = time.monotonic()
    world, dtype = control.world, layout.param_dtype
    small = tiny_config(cfg, layout.degrees)
    with undisturbed(world, keeps_groups=cfg.parallel.engine != "fsdp"):
        expected = by_one_process(small.model, world, dtype)
        found = by_all_ranks(small, world, layout)
    apart = {name: distance(found[name], value) for name, value in expected.items()}
    ranks = control.gather(list(apart.values()))
    apart = dict(zip(apart, map(max, zip(*ranks, strict=True)), strict=True))
    name = describe_layout(cfg.parallel.engine, layout.degrees)
    limit = TOLERANCE[dtype]
    wrong = {name: value for name, value in apart.items() if not value <= limit}
    if wrong:
        differences = ", ".join(f"{name} by {value:.1e}" for name, value in wrong.items())
        raise Fault(
            f"self-test: {name} in {str(dtype).removeprefix('torch.')} differs from one process in {differences} "
            f"(relative; {limit:g} is allowed); do not train in this layout: choose other parallel.* degrees or "
            "another parallel.engine, or try another version of torch"
        )
    return Agreed(name, max(apart.values()), time.monotonic() - began)


def tiny_config(cfg: Config, degrees: Degrees) -> Config:
    """This config with a model of a few thousand parameters, and heads that fit."""
    heads = degrees.ulysses if degrees.ulysses > 1 else 2
    model = ModelConfig(
        num_layers=1,
        num_heads=heads,
        head_dim=16,
        ffn_dim=32,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        attention=cfg.model.attention,
        compile="off",
    )
    return cfg.model_copy(update={"model": model})


@contextmanager
def undisturbed(world: World, *, keeps_groups: bool) -> Iterator[None]:
    """Undo what the block does to the process: its random draws, and the process groups it makes unless
    `keeps_groups`. DeepSpeed makes its groups once for a process, and the run uses them again."""
    before = set(groups())
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
    if keeps_groups:
        return
    for number, group in list(groups().items()):
        if number not in before:
            dist.destroy_process_group(group)


def groups() -> dict[int, dist.ProcessGroup]:
    return {id(group): group for group in dist.distributed_c10d._world.pg_map}


def tiny_model(model: ModelConfig) -> VideoDiT:
    found = VideoDiT(model)
    with torch.no_grad():
        for number, parameter in enumerate(found.parameters()):
            # Zeros, as some layers start, would hide what lies behind them.
            parameter.copy_(draw(*parameter.shape, seed=number) / parameter.shape[-1] ** 0.5)
    return found


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, part: int, world: World) -> Tensor:
    """The loss of the micro-batch of one group of ranks: an image for every other one, else a clip."""
    frames, device = 3 - 2 * (part % 2), world.device
    x = draw(2, 4, frames, 6, 10, seed=1000 + part)
    t = draw(2, frames, seed=2000 + part).sigmoid()
    captions = draw(2, 5, 16, seed=3000 + part)
    target = draw(2, 4, frames, 6, 10, seed=4000 + part)
    v = model(
        x.to(device),
        t.to(device),
        captions.to(device),
        torch.ones(2, 5, dtype=torch.bool, device=device),
    )
    return (v - target.to(device)).square().mean() / world.dp_size


def by_one_process(model: ModelConfig, world: World, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss, norm and gradients of the plain model, computed in `dtype`, summed in at least float32."""
    plain = tiny_model(model).to(world.device, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.zeros((), dtype=torch.float64)
    sums = {name: torch.zeros_like(value, dtype=wide) for name, value in plain.named_parameters()}
    for part in range(world.dp_size):
        loss = loss_of(plain, part, world)
        loss.backward()
        total += loss.detach().double().cpu()
        for name, value in plain.named_parameters():
            if value.grad is not None:
                sums[name] += value.grad
        plain.zero_grad()
    norm = torch.stack([value.double().square().sum() for value in sums.values()]).sum().sqrt()
    return {"loss": total, "gradient norm": norm.cpu()} | {
        f"the gradient of {name}": sums[name] for name in COMPARED
    }


def by_all_ranks(cfg: Config, world: World, layout: Layout) -> dict[str, Tensor]:
    """The same of the run's engine: gradients are how far a step moves each weight."""
    engine = build_engine(
        tiny_model(cfg.model),
        cfg,
        replace(world, owns_group=False),
        layout,
        lambda named, _: torch.optim.SGD(
            [{"params": list(named.values()), "lr_scale": 1.0}], lr=1.0
        ),
    )
    try:
        loss = loss_of(engine.model, world.dp_rank, world)
        engine.backward(loss, last=True)
        total = loss.detach().double().reshape(1).to(world.device)
        dist.all_reduce(total)
        norm = engine.gradient_norm()
        before = {name: full(engine.model_state()[name]).clone() for name in COMPARED}
        # Of a norm of 0 nothing is clipped.
        engine.step(LR, torch.zeros_like(norm), torch.zeros_like(norm, dtype=torch.bool))
        after = {name: full(engine.model_state()[name]) for name in COMPARED}
    finally:
        engine.close()
    moved = {
        f"the gradient of {name}": (before[name] - after[name]).double() / LR for name in COMPARED
    }
    return {
        "loss": total[0] / layout.degrees.cp,
        "gradient norm": norm.double().cpu(),
    } | moved


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    expected = expected.detach().double()
    scale = float(expected.abs().max().clamp_min(1e-30))
    return float((found.to(expected.device).double() - expected).abs().max()) / scale
