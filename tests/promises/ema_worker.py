"""Run under torchrun by test_ema_shards: averages of unevenly sharded weights, on 3 ranks and then on 2 of them.

Argument: a folder. Rank 0 writes what was found into FOLDER/found.json, checkpoints go to FOLDER/checkpoints; at
the end every rank kills itself.
"""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sora_train import checkpoint as checkpoints
from sora_train.parallel.shards import local
from sora_train.runtime.control_plane import ControlPlane
from sora_train.runtime.world import World
from sora_train.training.optim.ema import Ema

RANKS = 3
# Steps trained on 3 ranks, on 2 and on 1; each begins where the one before has saved.
ENDS = (5, 8, 11)
MORE, POST_HOC = (0.5,), (0.1,)


class Uneven(nn.Module):
    """Parameters whose first dimension 3 ranks cannot share evenly: 3+3+1, 2+2+0, 1+0+0, and 2+2+1."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"a": (7, 3), "b": (4,), "c": (1, 2), "d": (5, 2, 2)}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def weights_at(step: int) -> dict[str, Tensor]:
    """The weights after a step, whole: what training is stood in for by."""
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(parameter.shape, generator=generator)
        for name, parameter in Uneven().named_parameters()
    }


def build(mesh: DeviceMesh | None) -> tuple[nn.Module, Ema]:
    model = Uneven()
    put(model, weights_at(0))
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model, Ema(model, 0.9, MORE, POST_HOC)


@torch.no_grad()
def put(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Set the weights; each rank takes its rows, as torch.chunk deals them out."""
    for name, parameter in model.named_parameters():
        part = weights[name]
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            parts = part.chunk(mesh.size())
            mine = mesh.get_local_rank()
            part = parts[mine] if mine < len(parts) else part[:0]
        local(parameter.detach()).copy_(part)


def train(model: nn.Module, ema: Ema, first: int, end: int) -> None:
    for step in range(first, end):
        put(model, weights_at(step + 1))
        ema.update(step)


def tensors(model: nn.Module, ema: Ema) -> dict[str, Tensor]:
    live = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return checkpoints.canonical(live, {}, ema.state()) | ema.further_state()


def reference(end: int) -> dict[str, Tensor]:
    """The same on whole weights in one process."""
    model, ema = build(None)
    train(model, ema, 0, end)
    return tensors(model, ema)


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names that are not the same bit for bit; shapes first, since gathering one that is wrong would hang."""
    shapes = [name for name, tensor in expected.items() if found[name].shape != tensor.shape]
    if shapes:
        return shapes
    whole = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in found.items()
    }
    return [name for name, tensor in expected.items() if not torch.equal(whole[name], tensor)]


def swapped(model: nn.Module, ema: Ema, end: int) -> list[str]:
    """What a failed validation leaves changed."""
    try:
        with ema.swapped_in(model, "5"):
            raise KeyError
    except KeyError:
        return differing(tensors(model, ema), reference(end))


def mutated(model: nn.Module) -> list[str]:
    """Shadows as they would be if their shape was inferred from this rank's part."""
    inferred = {
        name: DTensor.from_local(
            local(parameter.detach()).clone(),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
        )
        for name, parameter in model.named_parameters()
    }
    return differing(inferred, {name: value for name, value in weights_at(0).items()})


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    meshes = [DeviceMesh("cpu", list(range(size))) for size in (3, 2)]
    controls = [ControlPlane(World(rank, size, rank, size, torch.device("cpu"))) for size in (3, 2)]
    controls[1].group = dist.new_group([0, 1], timeout=timedelta(seconds=60))
    found: dict[str, list[str]] = {}
    for place, (mesh, control, end) in enumerate(zip(meshes, controls, ENDS, strict=False)):
        if rank >= mesh.size():
            break
        model, ema = build(mesh)
        if place == 0:
            found["mutated"] = mutated(model)
        else:
            before = checkpoints.list_checkpoints(folder / "checkpoints")[-1]
            checkpoints.load(before, tensors(model, ema), control)
            found["loaded"] = differing(tensors(model, ema), reference(ENDS[place - 1]))
        train(model, ema, ENDS[place - 1] if place else 0, end)
        found[f"trained on {mesh.size()}"] = differing(tensors(model, ema), reference(end))
        found[f"swapped on {mesh.size()}"] = swapped(model, ema, end)
        checkpoints.save(folder / "checkpoints", end, tensors(model, ema), {"step": end}, control)
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
