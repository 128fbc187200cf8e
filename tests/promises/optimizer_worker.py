"""Run under torchrun by test_optimizer_shards: optimizers of unevenly sharded weights, on 3 ranks and then on 2.

Argument: a folder. Rank 0 writes what was found into FOLDER/found-<ranks>.pt, checkpoints go to FOLDER/<optimizer>; at
the end every rank kills itself.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sora_train import checkpoint as checkpoints
from sora_train.config.compose import compose
from sora_train.parallel.degrees import Degrees
from sora_train.parallel.fsdp import FsdpEngine
from sora_train.parallel.layout import Layout
from sora_train.parallel.shards import full, local
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World
from sora_train.training.optim.optim import build_optimizer

RANKS = 3
# Steps trained on 3 ranks, on 2 and on 1; each begins where the one before has saved.
ENDS = (4, 7, 9)
OPTIMIZERS = {
    "muon": ("optim.name=muon", "optim.momentum=0.8"),
    "schedule_free": ("optim.name=schedule_free",),
    "int8": ("optim.state=int8",),
    "fp8": ("optim.state=fp8",),
}


class Uneven(nn.Module):
    """Weights that 3 ranks cannot share evenly: several matrices of one shape, tall and wide, one of a single row, one
    large enough for codes, a patch embedding's kernel, a bias."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(7, 3), (3, 7), (7, 3), (1, 2), (7, 3), (67, 65), (5, 5)]
        self.blocks = nn.ModuleList([Weight(shape) for shape in shapes])
        self.patch_embedding = Weight((5, 2, 1, 2, 2))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self) -> Tensor:
        return torch.stack([parameter.sum() for parameter in self.parameters()]).sum()


class Weight(nn.Module):
    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


def drawn(seed: int) -> dict[str, Tensor]:
    """Values of every weight, whole."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in Uneven().named_parameters()
    }


class Run:
    """An engine of a number of ranks whose gradients are drawn."""

    def __init__(self, optimizer: str, world: World, dtype: torch.dtype = torch.float64):
        overrides = ["optim=adamw", "optim.weight_decay=0.1", "optim.eps=1e-4", "optim.grad_clip=2"]
        overrides += ["optim.lr_scales={blocks.0.*:3}", *OPTIMIZERS[optimizer]]
        cfg = compose(["experiment=parity_tiny", *overrides]).config
        layout = Layout(Degrees(1, world.size, 1, 1), dtype)
        model = Uneven().to(dtype)
        self.engine = FsdpEngine(model, cfg, world, layout, partial(build_optimizer, cfg.optim))
        self.fill(self.engine.model_state(), drawn(0))

    def fill(self, tensors: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
        """Each rank takes its rows, as torch.chunk deals them out."""
        mesh = self.engine.mesh
        for name, tensor in tensors.items():
            parts = whole[name].chunk(mesh.size())
            mine = mesh.get_local_rank()
            local(tensor).copy_(parts[mine] if mine < len(parts) else parts[0][:0])

    def train(self, first: int, end: int) -> None:
        engine = self.engine
        for step in range(first, end):
            grads = {name: local(w.detach()).clone() for name, w in engine.named.items()}
            self.fill(grads, drawn(step + 1))
            norm = torch.stack([g.square().sum() for g in drawn(step + 1).values()]).sum().sqrt()
            for name, shard in engine.shards.items():
                shard.grad = grads[name]
            # A bad step in between, whose gradients may be anything.
            if step % 3 == 1:
                engine.step(0.1, norm * torch.nan, torch.tensor(True))
                for name, shard in engine.shards.items():
                    shard.grad = grads[name]
            engine.step(0.01 * (step + 1), norm.to(engine.param_dtype), torch.tensor(False))

    def tensors(self) -> dict[str, Tensor]:
        return checkpoints.canonical(
            self.engine.model_state(), self.engine.optimizer_state(), self.engine.model_state()
        )

    def whole(self) -> dict[str, Tensor]:
        return {name: full(value).clone() for name, value in self.tensors().items()}


def world_of(rank: int, size: int) -> World:
    return World(rank, size, rank, size, torch.device("cpu"))


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Name -> largest difference over the largest value, where there is any."""
    assert found.keys() == expected.keys()
    differences = {}
    for name, value in expected.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        difference = float((found[name].double() - value.double()).abs().max())
        differences[name] = difference / max(float(value.double().abs().max()), 1e-30)
    return {name: value for name, value in differences.items() if value}


def part(folder: Path, optimizer: str, world: World, place: int) -> dict[str, dict[str, Tensor]]:
    """Train from where the ranks before have saved, and save; the same once more from that save."""
    control, saves, end = ControlPlane(world), folder / optimizer, ENDS[place]
    run = Run(optimizer, world)
    start = ENDS[place - 1] if place else 0
    if place:
        checkpoints.load(checkpoints.list_checkpoints(saves)[-1], run.tensors(), control)
    found = {"loaded": run.whole()}
    run.train(start, end - 1)
    middle = checkpoints.save(folder / f"{optimizer}-middle", end - 1, run.tensors(), {}, control)
    run.train(end - 1, end)
    checkpoints.save(saves, end, run.tensors(), {"step": end}, control)
    again = Run(optimizer, world)
    checkpoints.load(middle, again.tensors(), control)
    again.train(end - 1, end)
    return found | {"trained": run.whole(), "resumed": again.whole()}


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    for place, size in enumerate((RANKS, 2)):
        if rank >= size:
            break
        store = dist.FileStore(str(folder / f"store-{size}"), size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        found = {name: part(folder, name, world_of(rank, size), place) for name in OPTIMIZERS}
        if rank == 0:
            torch.save(found, folder / "found.tmp")
            (folder / "found.tmp").rename(folder / f"found-{size}.pt")
        dist.barrier()
        dist.destroy_process_group()
    # The first that ends takes the others with it.
    while not (folder / "found-2.pt").exists():
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
