"""Run under torchrun by test_deepspeed: engines on a small model, one cell of the table after another.

Arguments: a file for what was found (rank 0 writes it), then one JSON list of overrides a cell. The same `run_cell`
makes the reference in one process.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.models.text_to_video import TextToVideo
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.parallel.engine import build_engine, resolve_layout
from sora_train.parallel.protocol import Engine
from sora_train.parallel.shards import full
from sora_train.runtime import world as distributed
from sora_train.runtime.world import World
from sora_train.training.optim.optim import build_optimizer

FRAMES = (3, 1, 2)
"""Latent frames of one micro-batch after the other: videos and images mixed."""
LONG = "train.steps=50"
"""The override of cells of so many steps."""
SKIPPED = 2
"""The step before which a step of other data is skipped."""
BASE = ["experiment=parity_tiny", "optim.warmup_steps=0", "ema.decay=0.9"]


@dataclass
class Batch:
    latents: Tensor
    t: Tensor
    mask: Tensor
    target: Tensor
    prompts: list[str]
    weight: float


def batch_of(cfg: Config, step: int, number: int) -> Batch:
    """The number-th micro-batch of a step, the same in every layout; every fifth one weighs nothing."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    frames = FRAMES[(step + number) % len(FRAMES)]
    shape = (2, cfg.model.in_channels, frames, 4, 4)
    target = (2, cfg.model.velocity_channels, *shape[2:])
    weight = 0.0 if (7 * step + number) % 5 == 4 else 1.0 + number
    prompts = [f"a red circle moves {step}", ""]
    return Batch(
        torch.randn(shape, generator=generator),
        torch.rand(2, frames, generator=generator),
        (torch.rand(2, frames, generator=generator) > 0.7).float(),
        torch.randn(target, generator=generator),
        prompts,
        weight,
    )


def forward_backward(
    engine: Engine, cfg: Config, world: World, step: int, scale: float = 1.0
) -> float:
    """This rank's share of a step, up to the gradients; its part of the loss."""
    count = cfg.train.micro_batches
    slots = [*range(world.rank, count, world.size)]
    slots += [-1] * (-(-count // world.size) - len(slots))
    total = sum(batch_of(cfg, step, number).weight for number in range(count))
    found = 0.0
    for place, number in enumerate(slots):
        batch = batch_of(cfg, step, max(number, 0))
        weight = batch.weight if number >= 0 else 0.0
        loss = error_of(engine.model, batch) * weight / total
        engine.backward(loss * scale, last=place == len(slots) - 1)
        found += float(loss.detach())
    return found


def error_of(model: nn.Module, batch: Batch) -> Tensor:
    if isinstance(model, VideoVAE):
        frames = 4 * batch.latents.shape[2] - 3
        pixels = batch.latents.repeat_interleave(4, dim=2)[:, :3, :frames].repeat(1, 1, 1, 4, 4)
        reconstruction, mean, log_variance = model(pixels)
        spread = mean.square() + log_variance.exp() - log_variance
        return (reconstruction - pixels).square().mean() + 0.1 * spread.mean()
    text = model.tokenize(batch.prompts)
    v = model(batch.latents, batch.t, text, mask_BT=batch.mask)
    return (v - batch.target).square().mean()


def steps_of(
    engine: Engine, cfg: Config, world: World, steps: int
) -> Iterator[tuple[float, float]]:
    for step in range(steps):
        if step == SKIPPED:
            forward_backward(engine, cfg, world, 100, scale=1e4)
            engine.gradient_norm()
            engine.skip()
        loss = torch.tensor(forward_backward(engine, cfg, world, step), dtype=torch.float64)
        dist.all_reduce(loss)
        norm = engine.gradient_norm()
        engine.step(cfg.optim.lr, norm, torch.tensor(False))
        yield float(loss), float(norm)


def make(overrides: list[str], world: World) -> tuple[Engine, Config]:
    cfg = compose([*BASE, *overrides]).config
    world, layout = resolve_layout(cfg, world)
    model: nn.Module = TextToVideo(cfg.model, cfg.text, seed=cfg.seed)
    if cfg.task == "vae":
        model = VideoVAE.from_config(cfg.vae, trainable=True, seed=cfg.seed)
    return build_engine(model, cfg, world, layout, partial(build_optimizer, cfg.optim)), cfg


def run_cell(overrides: list[str], world: World, steps: int = 5) -> dict[str, Any]:
    engine, cfg = make(overrides, world)
    curve = list(steps_of(engine, cfg, world, steps))
    weights = {name: full(value).clone() for name, value in engine.model_state().items()}
    moments = {name: full(value).clone() for name, value in engine.optimizer_state().items()}
    dtypes = sorted({str(p.dtype) for p in engine.model.parameters()})
    engine.close()
    return {"curve": curve, "weights": weights, "moments": moments, "dtypes": dtypes}


def main() -> None:
    out, *cells = sys.argv[1:]
    found, world = [], distributed.start("cpu", 1)
    for cell in cells:
        overrides = json.loads(cell)
        found.append(run_cell(overrides, world, 50 if LONG in overrides else 5))
    if world.is_main:
        torch.save(found, out)
    dist.barrier()
    distributed.stop(world)


if __name__ == "__main__":
    main()
