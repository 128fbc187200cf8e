"""The engine: what turns a loss into a step. One protocol; FSDP2 serves one process, DDP, FSDP and HSDP.

DeepSpeed's ZeRO is in sora_train/parallel/deepspeed/engine.py."""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sora_train.config import Config
from sora_train.errors import ConfigError, Fault
from sora_train.models.transformer.attention_backends import check_attention
from sora_train.parallel.compile import check_compiler, resolve_compile
from sora_train.parallel.context.context import apply_context_parallel
from sora_train.parallel.deepspeed.engine import ZeroEngine, require_deepspeed
from sora_train.parallel.deepspeed.settings import check_zero
from sora_train.parallel.degrees import Degrees, resolve_degrees
from sora_train.parallel.materialise import materialise
from sora_train.parallel.memory.activations import prepare_blocks
from sora_train.parallel.memory.host_optimizer import HostCopies, placed_on_host
from sora_train.parallel.mesh import build_mesh
from sora_train.parallel.parallelize import apply_fsdp
from sora_train.parallel.shards import FlatShard
from sora_train.runtime.world import World

OptimizerBuilder = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]
"""From parameters by name to the optimizer of them."""


class Weights(Protocol):
    """Master weights by name: a module, or what an engine has whose module holds them in another form."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...


class Engine(Protocol):
    """What the Trainer asks of an engine. Parameters and moments are named, never numbered."""

    model: nn.Module
    """What computes."""

    @property
    def weights(self) -> Weights:
        """What is averaged."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradients; `last` marks the step's last one, where ranks meet.

        `loss` is the micro-batch's sum divided by the step's true total weight, so gradients are summed; the
        ranks that share its tokens all give the same.
        """

    def gradient_norm(self) -> float:
        """The global norm of the step's gradients, the same on all ranks; once a step, after the last backward."""

    def step(self, lr: float, norm: float) -> None:
        """Clip by this norm, update the weights at this learning rate, forget the gradients."""

    def skip(self) -> None:
        """Forget the step's gradients; weights and moments stay as they are."""

    def recompiles(self) -> int | None:
        """Graphs this rank has compiled needlessly so far; None where nothing is compiled."""

    def model_state(self) -> dict[str, Tensor]:
        """Parameter name -> float32 master weight, sharded as it lies, in place loadable."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """`<parameter name>.<exp_avg|exp_avg_sq|step>` -> tensor, in place loadable."""

    def weights_changed(self) -> None:
        """Compute with the tensors of `model_state` as they are now, after they were filled; on all ranks."""

    def close(self) -> None:
        """Let go of what would outlive the engine."""


class FsdpEngine:
    """FSDP2 over a mesh of any shape; a mesh of one rank is the single process."""

    def __init__(
        self, model: nn.Module, cfg: Config, world: World, build_optimizer: OptimizerBuilder
    ):
        self.grad_clip = cfg.optim.grad_clip
        self.param_dtype = resolve_param_dtype(cfg.parallel.param_dtype, world.device)
        self.mesh = build_mesh(cfg.parallel, world)
        self.cp = world.cp
        self.reduced_each = cfg.parallel.accumulate == "sharded"
        self.compile = resolve_compile(cfg.model.compile, world.device)
        self._recompiles, _ = prepare_blocks(model, cfg, world.device)
        empty = any(p.is_meta for p in model.parameters())
        placed = model if empty else model.to(world.device)
        self.model = apply_fsdp(placed, self.mesh, self.param_dtype)
        if empty:
            materialise(self.model, world.device)
        self.weights: Weights = self.model
        # The optimizer works on this rank's own parts as plain tensors: they share the parameters' memory,
        # and an elementwise update needs no DTensor, whose dispatch cost a fifth of a small model's step.
        self.shards = {name: local_parameter(p) for name, p in self.model.named_parameters()}
        self.on_host = HostCopies(self.shards) if cfg.parallel.offload_optimizer else None
        stepped = self.on_host.copies if self.on_host else self.shards
        self.optimizer: torch.optim.Optimizer = build_optimizer(stepped)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last or self.reduced_each)
            # Over replicas once a step in any case: what is reduced there is as small as what is kept.
            self.model.set_requires_all_reduce(last)
        # Ranks that share a micro-batch's tokens each hold its whole loss.
        (loss / self.cp if self.cp > 1 else loss).backward()

    def gradient_norm(self) -> float:
        # Squares are summed over the axis that shards, not over replicas, which hold the same ones.
        for name, parameter in self.model.named_parameters():
            self.shards[name].grad = None if parameter.grad is None else local(parameter.grad)
            parameter.grad = None
        # Of float64 in float64, or layouts would differ by the order of float32 sums alone.
        dtype = torch.float64 if self.param_dtype == torch.float64 else None
        square = torch.stack(torch._foreach_norm(self._grads(), 2, dtype)).square().sum()
        dist.all_reduce(square, group=self.mesh.get_group("fsdp"))
        return float(square.sqrt())

    def step(self, lr: float, norm: float) -> None:
        if 0 < self.grad_clip < norm:
            torch._foreach_mul_(self._grads(), self.grad_clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self.on_host:
            self.on_host.step(self.optimizer)
        else:
            self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        for shard in self.shards.values():
            shard.grad = None

    def recompiles(self) -> int | None:
        return None if self._recompiles is None else self._recompiles.count

    def _grads(self) -> list[Tensor]:
        return [shard.grad for shard in self.shards.values() if shard.grad is not None]

    def model_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def optimizer_state(self) -> dict[str, Tensor]:
        if not isinstance(self.optimizer, torch.optim.AdamW):
            return {}
        state: dict[str, Tensor] = {}
        stepped = self.on_host.copies if self.on_host else self.shards
        placed = placed_on_host if self.on_host else placed_as
        for name, parameter in self.model.named_parameters():
            moments = self._moments(stepped[name])
            state[f"{name}.step"] = moments["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{name}.{key}"] = placed(moments[key], parameter)
        return state

    def weights_changed(self) -> None:
        """Masters are what is gathered to compute with."""

    def close(self) -> None:
        """Nothing outlives it."""

    def _moments(self, shard: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's state of one parameter; made before its first step so that it can be loaded into."""
        state = self.optimizer.state[shard]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=shard.device)
            state["exp_avg"] = torch.zeros_like(shard)
            state["exp_avg_sq"] = torch.zeros_like(shard)
        return state


def local_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """This rank's part of a parameter, sharing its memory."""
    return nn.Parameter(local(parameter.detach()), requires_grad=parameter.requires_grad)


def placed_as(part: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a tensor that is sharded as `parameter` is, sharing memory with the part."""
    if isinstance(parameter, FlatShard):
        return parameter.placed(part)
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def build_engine(
    model: nn.Module, cfg: Config, world: World, build_optimizer: OptimizerBuilder
) -> Engine:
    """The engine that `parallel.engine` names.

    Raises Fault where an optimizer keeps state in less than float32.
    """
    apply_context_parallel(model, resolve_degrees(cfg.parallel, world.size), world)
    if cfg.parallel.engine == "fsdp":
        engine: Engine = FsdpEngine(model, cfg, world, build_optimizer)
    else:
        dtype = resolve_param_dtype(cfg.parallel.param_dtype, world.device)
        engine = ZeroEngine(model, cfg, world, build_optimizer, dtype)
    require_precise(engine)
    return engine


def require_precise(engine: Engine) -> None:
    """Raises Fault naming the first master or moment that is kept in less than float32."""
    for what, state in (("weight", engine.model_state()), ("state", engine.optimizer_state())):
        for name, tensor in state.items():
            if torch.promote_types(tensor.dtype, torch.float32) != tensor.dtype:
                raise Fault(
                    f"the optimizer's {what} of {name} is kept in {tensor.dtype}, where small updates are lost; "
                    "masters and moments are float32, so build the model and its optimizer in that"
                )


def check_engine(cfg: Config, degrees: Degrees, device: torch.device) -> None:
    """Raises ConfigError where the engine cannot do what is asked, or its package is missing."""
    parallel = cfg.parallel
    if parallel.engine != "fsdp":
        require_deepspeed(parallel.engine)
        check_zero(cfg, degrees, resolve_param_dtype(parallel.param_dtype, device))
        return
    if parallel.offload_params:
        raise ConfigError(
            "parallel.offload_params=true and parallel.engine=fsdp, which keeps weights on the device; set "
            "parallel.engine=zero3, the one that can"
        )
    if parallel.deepspeed_json:
        raise ConfigError(
            f"parallel.deepspeed_json={parallel.deepspeed_json} is DeepSpeed's, and parallel.engine=fsdp is not; leave "
            "it empty, or set parallel.engine=zero1, zero2 or zero3"
        )


def resolve_param_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU; on a CPU float32, since few CPUs multiply bfloat16 faster."""
    if wanted != "auto":
        return getattr(torch, wanted)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def check_kernels(cfg: Config, device: torch.device) -> None:
    """Raises ConfigError if the transformer asks for an attention kernel or a compiler that is not here."""
    if cfg.task == "text_to_video":
        check_attention(cfg.model, device, resolve_param_dtype(cfg.parallel.param_dtype, device))
        check_compiler(cfg.model.compile, device)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank (a collective when it is sharded)."""
    if isinstance(tensor, FlatShard):
        return tensor.full()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor | FlatShard) else tensor
