"""Run under torchrun by test_context_parallel: every measurement of one world size in one process group.

Arguments: a folder, then one JSON list of overrides for each whole run of the trainer, which writes into
FOLDER/run-N. What else is measured, each number the worst over all ranks, goes to FOLDER/found.json.
"""

import copy
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.config.compose import compose
from sora_train.config.model import ModelConfig
from sora_train.distributed import World
from sora_train.models.dit import VideoDiT
from sora_train.parallel.collectives import gather_tokens, heads_to_tokens, tokens_to_heads
from sora_train.parallel.context import apply_context_parallel, context_groups, segments
from sora_train.parallel.mesh import Degrees
from sora_train.parallel.ring import ring_attention
from sora_train.trainer import Trainer

MODEL = ModelConfig(
    num_layers=2, num_heads=4, head_dim=16, ffn_dim=48, in_channels=4, out_channels=4, text_dim=24, freq_dim=16,
    mask_channel=True,
)  # fmt: skip
LAYOUTS = {2: [(2, 1), (1, 2)], 4: [(4, 1), (1, 4), (2, 2)]}
"""(ulysses, ring) by world size."""
CLIPS = [(2, 3, 1, 13), (1, 1, 1, 7), (2, 1, 1, 3), (1, 2, 1, 1), (1, 3, 2, 5)]
"""Clips, latent frames, rows and columns of patches: images and videos, primes, and fewer tokens than ranks."""


def worst(value: float) -> float:
    """The largest over all ranks."""
    found = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    scale = float(expected.abs().max().clamp_min(1e-30))
    return float((found.double() - expected.double()).abs().max()) / scale if found.numel() else 0.0


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_model(dtype: torch.dtype) -> VideoDiT:
    model = VideoDiT(MODEL).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            # Zeros, as layers start, would hide what lies behind them.
            parameter.copy_(random(*parameter.shape, seed=number) / parameter.shape[-1] ** 0.5)
    return model.to(dtype)


def inputs(clip: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    batch, frames, rows, columns = clip
    return {
        "latents_BCTHW": random(batch, 4, frames, 2 * rows, 2 * columns, seed=1).to(dtype),
        "t_BT": random(batch, frames, seed=2).sigmoid(),
        "captions_BSE": random(batch, 5, 24, seed=3).to(dtype),
        "caption_mask_BS": torch.arange(5)[None] < torch.tensor([[3], [5]])[:batch],
    }


def backward(model: VideoDiT, clip: tuple[int, int, int, int], dtype: torch.dtype, share: int) -> Tensor:
    """Velocity, and the gradients of a loss of it, of which this rank takes 1 / share."""
    model.zero_grad()
    batch = inputs(clip, dtype)
    v = model(batch["latents_BCTHW"], batch["t_BT"], batch["captions_BSE"], batch["caption_mask_BS"])
    loss = (v * random(*v.shape, seed=4).to(v.dtype)).sum() + v.square().sum()
    (loss / share).backward()
    return v.detach()


def compare_models(world: World, degrees: Degrees, dtype: torch.dtype) -> dict[str, float]:
    """Velocity and summed gradients of every parameter against one process in the same precision."""
    found = {}
    plain = make_model(dtype)
    cut = copy.deepcopy(plain)
    apply_context_parallel(cut, degrees, world)
    for clip in CLIPS:
        expected = backward(plain, clip, dtype, 1)
        v = backward(cut, clip, dtype, degrees.cp)
        name = "x".join(map(str, clip))
        found[f"velocity {name}"] = worst(distance(v, expected))
        apart = []
        for mine, whole in zip(cut.parameters(), plain.parameters(), strict=True):
            # Every parameter has a gradient on every rank: an engine reduces them all.
            total = mine.grad.double()
            dist.all_reduce(total)
            if whole.grad.abs().max() > 1e-12:
                apart.append(distance(total, whole.grad))
        found[f"gradients {name}"] = worst(max(apart))
        same = v.clone()
        dist.broadcast(same, 0)
        found[f"equal on all ranks {name}"] = worst(float((same != v).sum()))
    return found


def check_adjoint(function: Callable[..., tuple[Tensor, ...]], mine: list[Tensor]) -> float:
    """Gradients against central differences, where the objective is a sum over the outputs of ALL ranks."""
    rank = dist.get_rank()
    mine = [x.requires_grad_() for x in mine]

    def objective(inputs: list[Tensor]) -> Tensor:
        outputs = function(*inputs)
        return sum((y * random(*y.shape, seed=100 + 10 * rank + i)).sum() for i, y in enumerate(outputs))

    grads = torch.autograd.grad(objective(mine), mine)
    off = 0.0
    for rank_moved in range(dist.get_world_size()):
        for number in range(len(mine)):
            size = torch.tensor([mine[number].numel()])
            dist.broadcast(size, rank_moved)
            for place in range(0, int(size), max(1, int(size) // 7)):
                ends = []
                for step in (1e-5, -1e-5):
                    moved = [x.detach().clone() for x in mine]
                    if rank == rank_moved:
                        moved[number].view(-1)[place] += step
                    total = objective(moved).detach().clone().reshape(1)
                    dist.all_reduce(total)
                    ends.append(float(total))
                if rank == rank_moved:
                    off = max(off, abs((ends[0] - ends[1]) / 2e-5 - float(grads[number].view(-1)[place])))
    return worst(off)


def check_collectives(world: World, degrees: Degrees) -> dict[str, float]:
    groups = context_groups(degrees, world)
    found = {}
    for tokens in (5, 3):
        sizes = segments(tokens, degrees.cp)
        own = sizes[dist.get_rank(groups.whole)]
        x = random(2, 3, own, 2, seed=7 + world.rank)
        found[f"gather {tokens}"] = check_adjoint(
            lambda x, sizes=sizes: (gather_tokens(x, sizes, groups.whole),), [x]
        )
        if degrees.ulysses == degrees.cp:
            name = groups.whole.group_name
            x = random(2, own, 4, 3, seed=7 + world.rank)
            found[f"to heads {tokens}"] = check_adjoint(
                lambda x, sizes=sizes: (tokens_to_heads(x, sizes, world.rank, name),), [x]
            )
            y = random(2, tokens, 4 // degrees.cp, 3, seed=7 + world.rank)
            found[f"to tokens {tokens}"] = check_adjoint(
                lambda y, sizes=sizes: (heads_to_tokens(y, sizes, world.rank, name),), [y]
            )
        if degrees.ring == degrees.cp:
            name = groups.ring.group_name
            qkv = [random(2, own, 2, 4, seed=10 * i + world.rank) for i in range(3)]
            found[f"ring {tokens}"] = check_adjoint(
                lambda q, k, v, sizes=sizes: (ring_attention(q, k, v, sizes, name),), qkv
            )
    return found


def main() -> None:
    folder, *runs = sys.argv[1:]
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for ulysses, ring in (LAYOUTS[size] if "x" not in folder else []):
        degrees, name = Degrees(1, 1, ulysses, ring), f"ulysses {ulysses} x ring {ring}"
        world = World(rank, size, rank, size, torch.device("cpu"), cp=size)
        found[f"float64, {name}"] = compare_models(world, degrees, torch.float64)
        found[f"bfloat16, {name}"] = compare_models(world, degrees, torch.bfloat16)
        found[f"adjoints, {name}"] = check_collectives(world, degrees)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found, indent=1))
    for number, cell in enumerate(runs):
        overrides = [f"run.dir={folder}/run-{number}", *json.loads(cell)]
        Trainer(compose(["experiment=parity_tiny", *overrides]).config).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
