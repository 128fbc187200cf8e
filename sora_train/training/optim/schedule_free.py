"""Schedule-free AdamW: an average of the weights that replaces the decay of the learning rate.

Defazio et al. 2024, arXiv:2405.15682, algorithm 1. Of each weight there are z, which takes the steps, its weighted mean
x, and y between the two, where gradients are taken. With the gradient g at y and the rate lr of the step t:

    y = (1 - beta1) z + beta1 x
    v <- beta2 v + (1 - beta2) g^2
    gamma = lr sqrt(1 - beta2^t)
    u = g / (sqrt(v) + eps) + decay y
    z <- z - gamma u
    c = gamma^2 / (sum of gamma^2 so far)
    x <- (1 - c) x + c z

The model trains with y, so y is the weight. What is kept beside it is a = z - y, which begins at zero whatever the
weights begin with, and by which the last lines become

    y <- y + c a - gamma (1 - beta1 (1 - c)) u
    a <- (1 - c) (a - gamma beta1 u)
    x  = y - a (1 - beta1) / beta1

x is the average that validation, samples and exports compute with: it takes the place of the one of `ema.decay`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sora_train.config import OptimConfig
from sora_train.parallel.memory.moments import moments_of
from sora_train.parallel.shards import local
from sora_train.training.optim.judged import Judged

TINY = 1e-30
"""Instead of a sum of squared rates that is 0: before the first step that is taken."""


class ScheduleFreeAdamW(Judged):
    """The update of this file's formulas; `lr` of a group is the step's, warm-up included."""

    def __init__(self, groups: Iterable[dict[str, Any]], cfg: OptimConfig):
        super().__init__(groups, {"lr": cfg.lr, "betas": tuple(cfg.betas), "eps": cfg.eps})

    def initial_state(self, parameter: Tensor) -> dict[str, Tensor]:
        return {
            "step": torch.zeros((), device=parameter.device),
            "rate_squares": torch.zeros((), dtype=torch.float64, device=parameter.device),
            "exp_avg_sq": torch.zeros_like(parameter),
            "ahead": torch.zeros_like(parameter),
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, y: Tensor, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        grad, taken, state = self.gradient(y), self.taken(), moments_of(self, y)
        v, ahead, squares = state["exp_avg_sq"], state["ahead"], state["rate_squares"]
        state["step"] += taken
        rate = (1.0 - beta2 ** state["step"].double()).sqrt() * group["lr"] * taken
        squares += rate.square()
        share = rate.square() / squares.clamp(min=TINY)
        new = (1.0 - beta2) * taken
        v.mul_(1.0 - new).add_(grad.square() * new)
        step = grad.div(v.sqrt().add_(group["eps"])).add_(y, alpha=group["weight_decay"])
        y.add_(ahead * share).sub_(step * (rate * (1.0 - beta1 * (1.0 - share))))
        ahead.sub_(step * (rate * beta1)).mul_(1.0 - share)


def average_of(
    cfg: OptimConfig, state: Mapping[str, Tensor]
) -> Callable[[str, Tensor], Tensor] | None:
    """The optimizer's own average x of a parameter, from its name and this rank's part of it; None where there is none.

    `state` is the engine's `optimizer_state`, whose tensors follow the steps.
    """
    if cfg.name != "schedule_free":
        return None
    back = (1.0 - cfg.betas[0]) / cfg.betas[0]
    return lambda name, y: torch.sub(y, local(state[f"{name}.ahead"]), alpha=back)
