"""The engine: what turns a loss into a step. One protocol; FSDP2 serves one process, DDP, FSDP and HSDP."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sora_train.config import Config
from sora_train.distributed import World
from sora_train.parallel.mesh import build_mesh
from sora_train.parallel.parallelize import apply_fsdp

OptimizerBuilder = Any


class Engine(Protocol):
    """What the Trainer asks of an engine. Parameters and moments are named, never numbered."""

    model: nn.Module

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradients; `last` marks the step's last one, where ranks meet.

        `loss` is this rank's sum divided by the step's true total weight, so gradients are summed.
        """

    def step(self, lr: float) -> float:
        """Clip, update the weights at this learning rate, return the norm before clipping."""

    def model_state(self) -> dict[str, Tensor]:
        """Parameter name -> float32 master weight, sharded as it lies."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """`<parameter name>.<exp_avg|exp_avg_sq|step>` -> tensor, in place loadable."""


class FsdpEngine:
    """FSDP2 over a mesh of any shape; a mesh of one rank is the single process."""

    def __init__(self, model: nn.Module, cfg: Config, world: World, build_optimizer: OptimizerBuilder):
        self.grad_clip = cfg.optim.grad_clip
        self.param_dtype = resolve_param_dtype(cfg.parallel.param_dtype, world.device)
        self.mesh = build_mesh(cfg.parallel, world)
        self.model = apply_fsdp(model.to(world.device), self.mesh, self.param_dtype)
        self.optimizer: torch.optim.Optimizer = build_optimizer(self.model)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        loss.backward()

    def step(self, lr: float) -> float:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = full(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if self.grad_clip > 0 and torch.isfinite(norm):
            nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def model_state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def optimizer_state(self) -> dict[str, Tensor]:
        state = {}
        for name, parameter in self.model.named_parameters():
            for key, value in self._moments(parameter).items():
                state[f"{name}.{key}"] = value
        return state

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's state of one parameter; made before its first step so that it can be loaded into."""
        if not isinstance(self.optimizer, torch.optim.AdamW):
            return {}
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state


def resolve_param_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU; on a CPU float32, since few CPUs multiply bfloat16 faster."""
    if wanted != "auto":
        return getattr(torch, wanted)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def full(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank (a collective when it is sharded)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing memory with it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
