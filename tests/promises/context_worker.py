"""Run as a process of its own by test_context_parallel: every rank of every world size is a fork of it, so that
torch is imported once.

Arguments: a folder; a JSON list of whole runs of the trainer (name, world, overrides), which write into
FOLDER/NAME; the world sizes; `compiled` to look at that alone, into FOLDER/compiled.json. What else is
measured, each number the worst over all ranks, goes to FOLDER/found-WORLD.json, what the ranks say to
FOLDER/log-WORLD.RANK.
"""

import copy
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sora_train.config.compose import compose
from sora_train.config.sections.model import ModelConfig
from sora_train.errors import Fault
from sora_train.models.transformer.dit import VideoDiT
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.parallel.compile import compile_blocks, graphs_compiled
from sora_train.parallel.context.collectives import gather_tokens, heads_to_tokens, tokens_to_heads
from sora_train.parallel.context.context import (
    apply_context_parallel,
    make_context_groups,
    segments,
)
from sora_train.parallel.context.peers import ContextParallelSharing
from sora_train.parallel.context.ring import ring_attention
from sora_train.parallel.degrees import Degrees
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World
from sora_train.tools.doctor.parity.worker import import_everything
from sora_train.training.trainer import Trainer

MODEL = ModelConfig(
    num_layers=2, num_heads=4, head_dim=16, ffn_dim=48, in_channels=4, out_channels=4, text_dim=24, freq_dim=16,
    mask_channel=True,
)  # fmt: skip
IMAGES = MODEL.model_copy(update={"image_dim": 12, "image_tokens": 3})
"""With attention to embeddings of an image, in float64; in bfloat16 its roundings come on top of those allowed."""
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
    model = VideoDiT(IMAGES if dtype == torch.float64 else MODEL).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            # Zeros, as layers start, would hide what lies behind them.
            parameter.copy_(random(*parameter.shape, seed=number) / parameter.shape[-1] ** 0.5)
    return model.to(dtype)


def inputs(clip: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    batch, frames, rows, columns = clip
    images = {"images_BIE": random(batch, 3, 12, seed=5)} if dtype == torch.float64 else {}
    return images | {
        "latents_BCTHW": random(batch, 4, frames, 2 * rows, 2 * columns, seed=1).to(dtype),
        "t_BT": random(batch, frames, seed=2).sigmoid(),
        "captions": random(batch, 5, 24, seed=3).to(dtype),
        "caption_mask_BS": torch.arange(5)[None] < torch.tensor([[3], [5]])[:batch],
    }


def backward(
    model: VideoDiT, clip: tuple[int, int, int, int], dtype: torch.dtype, share: int
) -> Tensor:
    """Velocity, and the gradients of a loss of it, of which this rank takes 1 / share."""
    model.zero_grad()
    batch = inputs(clip, dtype)
    v = model(**batch)
    loss = (v * random(*v.shape, seed=4).to(v.dtype)).sum() + v.square().sum()
    (loss / share).backward()
    return v.detach()


def compare_models(
    world: World,
    degrees: Degrees,
    dtype: torch.dtype,
    clips: Sequence[tuple[int, int, int, int]],
    prepare: Callable[[VideoDiT], object] = lambda model: None,
) -> dict[str, float]:
    """Velocity and summed gradients of every parameter against one process in the same precision."""
    found = {}
    plain = make_model(dtype)
    cut = copy.deepcopy(plain)
    apply_context_parallel(cut, degrees, make_context_groups(degrees, world))
    prepare(cut)
    for clip in clips:
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


def recompute(model: VideoDiT) -> None:
    """Forget what the blocks compute, and compute it again in backward."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def measure_compiled(folder: Path, world: World) -> None:
    """The blocks traced as one graph, without the C++ compiler, whose work is the same with one rank."""
    torch.compile = partial(torch.compile, backend="aot_eager")
    found = {}
    for ulysses, ring in LAYOUTS[world.size]:
        degrees, before, counts = Degrees(1, 1, ulysses, ring), graphs_compiled(), []
        numbers = compare_models(
            world,
            degrees,
            torch.float64,
            [CLIPS[0], (2, 4, 1, 17), (2, 5, 3, 5)],
            lambda model, counts=counts: counts.append(compile_blocks(model, "dynamic")),
        )
        numbers["graphs"], numbers["needless"] = graphs_compiled() - before, counts[0].count
        found[f"ulysses {ulysses} x ring {ring}"] = numbers
    if world.is_main:
        (folder / "compiled.json").write_text(json.dumps(found, indent=1))


def check_adjoint(
    function: Callable[..., tuple[Tensor, ...]], mine: list[Tensor], how: tuple[Any, ...]
) -> float:
    """Gradients against central differences, where the objective is a sum over the outputs of ALL ranks."""
    rank = dist.get_rank()
    mine = [x.requires_grad_() for x in mine]

    def objective(inputs: list[Tensor]) -> Tensor:
        outputs = function(*inputs, *how)
        return sum(
            (y * random(*y.shape, seed=100 + 10 * rank + i)).sum() for i, y in enumerate(outputs)
        )

    grads = torch.autograd.grad(objective(mine), mine)
    off = 0.0
    for rank_moved in range(dist.get_world_size()):
        for number in range(len(mine)):
            size = torch.tensor([mine[number].numel()])
            dist.broadcast(size, rank_moved)
            for place in range(0, int(size), max(1, int(size) // 3)):
                ends = []
                for step in (1e-5, -1e-5):
                    moved = [x.detach().clone() for x in mine]
                    if rank == rank_moved:
                        moved[number].view(-1)[place] += step
                    total = objective(moved).detach().clone().reshape(1)
                    dist.all_reduce(total)
                    ends.append(float(total))
                if rank == rank_moved:
                    off = max(
                        off, abs((ends[0] - ends[1]) / 2e-5 - float(grads[number].view(-1)[place]))
                    )
    return worst(off)


def check_collectives(world: World, degrees: Degrees) -> dict[str, float]:
    groups = make_context_groups(degrees, world)
    assert groups is not None
    found = {}
    for tokens in (5, 3):
        sizes = segments(tokens, degrees.cp)
        own = sizes[dist.get_rank(groups.whole)]
        x = random(2, 3, own, 2, seed=7 + world.rank)
        found[f"gather {tokens}"] = check_adjoint(
            lambda x, *how: (gather_tokens(x, *how),), [x], (sizes, groups.whole)
        )
        if degrees.ulysses == degrees.cp:
            how = (sizes, world.rank, groups.whole.group_name)
            x = random(2, own, 4, 3, seed=7 + world.rank)
            found[f"to heads {tokens}"] = check_adjoint(
                lambda x, *how: (tokens_to_heads(x, *how),), [x], how
            )
            y = random(2, tokens, 4 // degrees.cp, 3, seed=7 + world.rank)
            found[f"to tokens {tokens}"] = check_adjoint(
                lambda y, *how: (heads_to_tokens(y, *how),), [y], how
            )
        if degrees.ring == degrees.cp:
            how = (sizes, groups.ring.group_name)
            qkv = [random(2, own, 2, 4, seed=10 * i + world.rank) for i in range(3)]
            found[f"ring {tokens}"] = check_adjoint(
                lambda q, k, v, *how: (ring_attention(q, k, v, *how),), qkv, how
            )
    return found


def check_spread(world: World, degrees: Degrees) -> dict[str, float]:
    """Work dealt out over ranks: what comes back, how much each did, and what becomes of a failure."""
    sharing = ContextParallelSharing(ControlPlane(world), make_context_groups(degrees, world))
    calls: list[int] = []

    def work(item: int) -> Tensor:
        calls.append(item)
        dtype = (torch.float32, torch.bfloat16, torch.float64)[item % 3]
        return random(item, 2, seed=item, dtype=torch.float32).to(dtype)

    found = {}
    for count in (1, 3, 7):
        calls.clear()
        results = sharing(range(count), work)
        wrong = sum(not torch.equal(result, work(item)) for item, result in enumerate(results))
        found[f"wrong of {count}"] = worst(float(wrong))
        found[f"most calls for {count}"] = worst(float(len(calls) - count))

    def fail(item: int) -> Tensor:
        if item == 1:
            raise ValueError("item 1 is bad")
        return work(item)

    try:
        sharing(range(3), fail)
    except (ValueError, Fault) as error:
        own = isinstance(error, ValueError)
        told = str(error).startswith("item 1" if own else "rank 1,") and own == (world.rank == 1)
        found["failures told wrongly"] = worst(float(not told))
    return found


def train(folder: Path, cell: dict[str, Any]) -> None:
    """A whole run of the trainer, and how many clips each rank has encoded in it."""
    calls = []
    encode = VideoVAE.encode

    def counted(vae: VideoVAE, pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        return encode(vae, pixels)

    run_dir = folder / cell["name"]
    trainer = Trainer(
        compose(["experiment=parity_tiny", f"run.dir={run_dir}", *cell["overrides"]]).config
    )
    VideoVAE.encode = counted
    try:
        trainer.train()
    finally:
        VideoVAE.encode = encode
    rank = os.environ.get("RANK", "0")
    (run_dir / f"encoded-{rank}.json").write_text(json.dumps(sum(calls)))


def measure(folder: Path, world: World) -> None:
    """Everything but whole runs, into FOLDER/found-WORLD.json."""
    degrees = Degrees(1, 1, *LAYOUTS[world.size][0])
    found: dict[str, dict[str, float]] = {"spread": check_spread(world, degrees)}
    for ulysses, ring in LAYOUTS[world.size]:
        degrees, name = Degrees(1, 1, ulysses, ring), f"ulysses {ulysses} x ring {ring}"
        found[f"float64, {name}"] = compare_models(world, degrees, torch.float64, CLIPS)
        found[f"recomputed, {name}"] = compare_models(
            world, degrees, torch.float64, CLIPS[:1], recompute
        )
        found[f"bfloat16, {name}"] = compare_models(world, degrees, torch.bfloat16, CLIPS[:1])
        found[f"adjoints, {name}"] = check_collectives(world, degrees)
    if world.is_main:
        (folder / f"found-{world.size}.json").write_text(json.dumps(found, indent=1))


def run_rank(
    rank: int, size: int, folder: Path, cells: list[dict[str, Any]], *, compiled: bool
) -> None:
    """One rank of a job: a fork of the process that has imported everything."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in names.items()})
    with (folder / f"log-{size}.{rank}").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if size > 1:
        store = dist.FileStore(str(folder / f"store-{size}"), size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120)
        )
        look = measure_compiled if compiled else measure
        look(folder, World(rank, size, rank, size, torch.device("cpu"), cp=size))
    for cell in cells:
        train(folder, cell)
    if size > 1:
        dist.destroy_process_group()


def main() -> None:
    folder, cells = Path(sys.argv[1]), json.loads(sys.argv[2])
    import_everything()
    for size in map(int, sys.argv[3].split(",")):
        own = [cell for cell in cells if cell["world"] == size]
        torch.multiprocessing.start_processes(
            partial(run_rank, compiled="compiled" in sys.argv),
            (size, folder, own),
            nprocs=size,
            start_method="fork",
        )


if __name__ == "__main__":
    main()
