"""What a training loop asks of an engine, whichever shards the model."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from sora_train.config import Config

OptimizerBuilder = Callable[[dict[str, nn.Parameter], Mapping[str, Tensor]], torch.optim.Optimizer]
"""From parameters by name to the optimizer of them. The second argument has the same names and says how each lies:
where the first holds this rank's part of a weight, it is the whole one's DTensor."""


class Weights(Protocol):
    """Master weights by name: a module, or what an engine has whose module holds them in another form."""

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]: ...


class NamedWeights:
    """Master weights by name, wherever an engine has them."""

    def __init__(self, named: Mapping[str, Tensor]):
        self.named = named

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        return self.named.items()


def kept_parameters(model: nn.Module, cfg: Config) -> dict[str, nn.Parameter]:
    """What a checkpoint holds and an average is made of: all parameters, but of a model with an adapter the adapter's
    alone, since the frozen base is another run's."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or not cfg.adapter.on
    }


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

    def gradient_norm(self) -> Tensor:
        """The global norm of the step's gradients, 0-d on the device, the same on all ranks; once a step, after the
        last backward."""

    def step(self, lr: float, norm: Tensor, bad: Tensor) -> None:
        """Clip by this norm, update the weights at this learning rate, forget the gradients; where `bad` is true only
        the last. Both are 0-d on the device, and an engine that updates there does not wait for them."""

    def skip(self) -> None:
        """Forget the step's gradients; weights and moments stay as they are."""

    def recompiles(self) -> int | None:
        """Graphs this rank has compiled needlessly so far; None where nothing is compiled."""

    def model_state(self) -> dict[str, Tensor]:
        """Name of each of `kept_parameters` -> float32 master weight, sharded as it lies, in place loadable."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """`<parameter name>.<what the optimizer keeps>`, such as `.exp_avg` -> tensor, in place loadable."""

    def weights_changed(self) -> None:
        """Compute with the tensors of `model_state` as they are now, after they were filled; on all ranks."""

    def close(self) -> None:
        """Let go of what would outlive the engine."""


def resolve_param_dtype(setting: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU; on a CPU float32, since few CPUs multiply bfloat16 faster."""
    if setting != "auto":
        return getattr(torch, setting)
    return torch.bfloat16 if device.type == "cuda" else torch.float32
