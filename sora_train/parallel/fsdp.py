"""The FSDP2 engine: one process, DDP, FSDP and HSDP over one mesh."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sora_train.config import Config
from sora_train.parallel.compile import resolve_compile
from sora_train.parallel.layout import Layout, build_mesh
from sora_train.parallel.materialise import materialise
from sora_train.parallel.memory.activations import prepare_blocks
from sora_train.parallel.memory.host_optimizer import HostCopies, placed_on_host
from sora_train.parallel.memory.masters import Masters
from sora_train.parallel.memory.moments import moments_of
from sora_train.parallel.memory.swap import swap_blocks
from sora_train.parallel.parallelize import apply_fsdp
from sora_train.parallel.protocol import (
    NamedWeights,
    OptimizerBuilder,
    Weights,
    kept_parameters,
)
from sora_train.parallel.shards import local, placed_as
from sora_train.runtime.world import World


class FsdpEngine:
    """FSDP2 over a mesh of any shape; a mesh of one rank is the single process."""

    def __init__(
        self,
        model: nn.Module,
        cfg: Config,
        world: World,
        layout: Layout,
        build_optimizer: OptimizerBuilder,
    ):
        self.grad_clip = cfg.optim.grad_clip
        self.param_dtype = layout.param_dtype
        self.mesh = build_mesh(layout.degrees, world)
        self.cp = layout.degrees.cp
        self.reduced_each = cfg.parallel.accumulate == "sharded"
        self.compile = resolve_compile(cfg.model.compile, world.device)
        self._recompiles, _ = prepare_blocks(model, cfg, world.device)
        empty = any(p.is_meta for p in model.parameters())
        placed = model if empty else model.to(world.device)
        self.model = apply_fsdp(placed, self.mesh, self.param_dtype)
        swapped = cfg.memory.swap_blocks
        self.swapper = swap_blocks(self.model, swapped, world.device) if swapped else None
        if empty:
            materialise(self.model, world.device)
        kept = kept_parameters(self.model, cfg)
        copied = self.mesh.size() == 1 and any(p.dtype != self.param_dtype for p in kept.values())
        self.masters = Masters(kept, self.param_dtype) if copied else None
        self.weights: Weights = self.masters or NamedWeights(kept)
        self.named = dict(self.weights.named_parameters())
        # The optimizer works on this rank's own parts as plain tensors: they share the parameters' memory,
        # and an elementwise update needs no DTensor, whose dispatch cost a fifth of a small model's step.
        self.shards = {name: local_parameter(p) for name, p in self.named.items()}
        self.on_host = HostCopies(self.shards) if cfg.parallel.offload_optimizer else None
        stepped = self.on_host.copies if self.on_host else self.shards
        self.optimizer: torch.optim.Optimizer = build_optimizer(stepped, self.named)
        # The kernels that do both, step and judge, take their scale in float32.
        self.judges_on_device = (
            getattr(self.optimizer, "_step_supports_amp_scaling", False)
            and not self.on_host
            and all(shard.dtype == torch.float32 for shard in self.shards.values())
        )

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last or self.reduced_each)
            # Over replicas once a step in any case: what is reduced there is as small as what is kept.
            self.model.set_requires_all_reduce(last)
        # Ranks that share a micro-batch's tokens each hold its whole loss.
        (loss / self.cp if self.cp > 1 else loss).backward()

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        # Squares are summed over the axis that shards, not over replicas, which hold the same ones.
        taken = self.masters.take_gradients() if self.masters else gradients_of(self.named)
        for name, shard in self.shards.items():
            shard.grad = taken.get(name)
        # Of float64 in float64, or layouts would differ by the order of float32 sums alone.
        dtype = torch.float64 if self.param_dtype == torch.float64 else None
        square = torch.stack(torch._foreach_norm(self._grads(), 2, dtype)).square().sum()
        dist.all_reduce(square, group=self.mesh.get_group("fsdp"))
        return square.sqrt()

    def step(self, lr: float, norm: Tensor, bad: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self.judges_on_device:
            # Torch's own means for this, made for its scaler of float16 gradients: the kernel divides by the
            # one and, where the other is not 0, leaves weights, moments and its count of steps alone.
            clipped = (norm / self.grad_clip).clamp(min=1.0) if self.grad_clip else None
            self.optimizer.grad_scale = None if clipped is None else clipped.float()
            self.optimizer.found_inf = bad.float()
            self.optimizer.step()
        elif not bad:
            if self.grad_clip:
                scale = (self.grad_clip / norm).clamp(max=1.0)
                torch._foreach_mul_(self._grads(), scale)
            if self.on_host:
                self.on_host.step(self.optimizer)
            else:
                self.optimizer.step()
        self.weights_changed()
        self.skip()

    def skip(self) -> None:
        for shard in self.shards.values():
            shard.grad = None

    def recompiles(self) -> int | None:
        return None if self._recompiles is None else self._recompiles.count

    def _grads(self) -> list[Tensor]:
        return [shard.grad for shard in self.shards.values() if shard.grad is not None]

    def model_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        stepped = self.on_host.copies if self.on_host else self.shards
        placed = placed_on_host if self.on_host else placed_as
        for name, parameter in self.named.items():
            for key, kept in moments_of(self.optimizer, stepped[name]).items():
                state[f"{name}.{key}"] = placed(kept, parameter) if kept.ndim else kept
        return state

    def weights_changed(self) -> None:
        # On several ranks masters are what is gathered to compute with.
        if self.masters:
            self.masters.copy_to_model()

    def close(self) -> None:
        """Nothing outlives it."""


def local_parameter(parameter: Tensor) -> nn.Parameter:
    """This rank's part of a parameter, sharing its memory."""
    return nn.Parameter(local(parameter.detach()), requires_grad=parameter.requires_grad)


def gradients_of(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's parts of the gradients, which the parameters let go of."""
    found = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            found[name] = local(parameter.grad)
            parameter.grad = None
    return found
