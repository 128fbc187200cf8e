"""The adversary of the autoencoder: a discriminator that is trained beside it, and what it adds to the decoder's loss.

It is replicated: every rank has it whole, gathers gradients of its own clips, and once a step all ranks add them up
in one buffer together with the number of clips. It is small beside the autoencoder, so that costs little, and needs
neither hooks nor gathering within the autoencoder's own backward; its weights, its moments and its answers are the
same on every rank and at any layout. Nothing changes before `step`, so a step that is skipped leaves it as it was.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.config import Config
from sora_train.errors import ConfigError, Fault
from sora_train.models.vae.discriminator import (
    Discriminator,
    accuracy,
    discriminator_loss,
    generator_loss,
    smallest_side,
)

LARGEST_RATIO = 1e4
DELTA = 1e-6
"""Bounds of the adaptive weight: Esser et al. 2021 (arXiv:2012.09841), eq. 7 and the code of it."""
ADAM_EPS = 1e-8


class Adversary:
    """Discriminator, optimizer, and this step's gradients and counts so far."""

    def __init__(self, cfg: Config, device: torch.device):
        goal = cfg.vae_objective
        self.cfg = goal
        self.discriminator = Discriminator(goal.disc_channels, goal.disc_layers, cfg.seed)
        self.discriminator.to(device)
        self.named = dict(self.discriminator.named_parameters())
        self.optimizer = self._build_optimizer(cfg.optim.name)
        self.steps = torch.zeros((), dtype=torch.int64)
        """Steps of the run: kept here, so that it goes back and forth with the weights."""
        self.counted = dict.fromkeys(("clips", "loss", "accuracy", "acted", "weight"), 0.0)

    def _build_optimizer(self, name: str) -> torch.optim.Optimizer:
        """AdamW, or plain SGD where the run takes that; without weight decay."""
        parameters = list(self.named.values())
        if name == "sgd":
            return torch.optim.SGD(parameters, lr=self.cfg.disc_lr)
        beta1, beta2 = self.cfg.disc_betas
        return torch.optim.AdamW(
            parameters,
            lr=self.cfg.disc_lr,
            betas=(beta1, beta2),
            eps=ADAM_EPS,
            weight_decay=0.0,
            fused=True,
        )

    @property
    def trains(self) -> bool:
        """Whether the discriminator learns in this step."""
        return int(self.steps) >= self.cfg.adversarial_from - self.cfg.adversarial_warmup

    @property
    def acts(self) -> bool:
        """Whether the adversarial term counts in the decoder's loss in this step."""
        return int(self.steps) >= self.cfg.adversarial_from

    def learn(self, pixels: Tensor, reconstruction: Tensor) -> None:
        """Add the discriminator's gradients on clips (B, 3, T, H, W) and what was decoded of them."""
        self.require_room(pixels)
        real = self.discriminator(pixels.float())
        made = self.discriminator(reconstruction.detach().float())
        loss = discriminator_loss(real, made).sum()
        loss.backward()
        self.counted["clips"] += len(pixels)
        self.counted["loss"] += float(loss.detach())
        self.counted["accuracy"] += float(accuracy(real, made).sum())

    def error(self, reconstruction: Tensor, likeness: Tensor | None) -> Tensor:
        """The decoder's loss (B,), differentiable in `reconstruction` alone.

        Args:
            likeness: (B,) the sum of the other terms of the decoder's loss. With it each clip's loss is weighted by
                |d likeness / d pixels| / |d loss / d pixels|: eq. 7 of arXiv:2012.09841, taken at what the last
                layer puts out in place of its weights, so that it is a matter of one clip and of no layout.
        """
        frozen = {name: parameter.detach() for name, parameter in self.named.items()}
        made = torch.func.functional_call(self.discriminator, frozen, reconstruction.float())
        loss = generator_loss(made)
        if likeness is not None:
            ratio = gradient_ratio(likeness, loss, reconstruction)
            self.counted["weight"] += float(ratio.sum())
            loss = ratio * loss
        else:
            self.counted["weight"] += len(loss)
        self.counted["acted"] += len(loss)
        return loss

    def step(self) -> dict[str, float]:
        """Update the discriminator by the gradients of all ranks; its metrics, the same on every rank.

        Raises:
            Fault: a gradient is not finite; nothing was changed.
        """
        row = {}
        if self.trains:
            row = self._learned()
        self.steps += 1
        self.skip()
        return row

    def skip(self) -> None:
        """Forget this step's gradients and counts."""
        self.optimizer.zero_grad(set_to_none=True)
        self.counted = dict.fromkeys(self.counted, 0.0)

    def _learned(self) -> dict[str, float]:
        parameters = list(self.named.values())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        counts = grads[0].new_tensor(list(self.counted.values()))
        buffer = torch.cat([grad.flatten() for grad in grads] + [counts])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(buffer)
        *summed, totals = buffer.split([p.numel() for p in parameters] + [len(counts)])
        total = dict(zip(self.counted, totals.tolist(), strict=True))
        clips = max(total["clips"], 1.0)
        for parameter, grad in zip(parameters, summed, strict=True):
            parameter.grad = (grad / clips).view_as(parameter)
        norm = float(buffer[: -len(counts)].norm()) / clips
        if not math.isfinite(norm):
            raise Fault(
                f"step {int(self.steps)}: the discriminator's gradient is {norm}; the last checkpoint is sound, lower "
                f"vae_objective.disc_lr ({self.cfg.disc_lr}) or look at the clips of this step"
            )
        if total["clips"]:
            self.optimizer.step()
        row = {
            "train/disc/loss": total["loss"] / clips,
            "train/disc/accuracy": total["accuracy"] / clips,
            "train/disc/grad_norm": norm,
        }
        if total["acted"]:
            row["train/disc/weight"] = self.cfg.adversarial * total["weight"] / total["acted"]
        return row

    def tensors(self) -> dict[str, Tensor]:
        """All there is to save, to be loaded into in place: `disc.*` and `disc_optim.*`."""
        named = {f"disc.{name}": parameter.detach() for name, parameter in self.named.items()}
        named["disc_optim.steps"] = self.steps
        if isinstance(self.optimizer, torch.optim.AdamW):
            for name, parameter in self.named.items():
                moments = adam_state(self.optimizer, parameter)
                named |= {f"disc_optim.{name}.{key}": value for key, value in moments.items()}
        return named

    def require_room(self, pixels: Tensor) -> None:
        """Raises ConfigError for clips too small for one patch."""
        smallest = smallest_side(self.cfg.disc_layers)
        if min(pixels.shape[-2:]) < smallest:
            raise ConfigError(
                f"vae_objective.disc_layers={self.cfg.disc_layers} needs frames of at least {smallest} pixels a side, "
                f"and a bucket has {pixels.shape[-2]}x{pixels.shape[-1]}; take fewer layers or larger buckets"
            )


def gradient_ratio(likeness: Tensor, loss: Tensor, at: Tensor) -> Tensor:
    """|d likeness / d at| / |d loss / d at| of each sample (B,), without a gradient of its own."""
    lengths = [
        torch.autograd.grad(value.sum(), at, retain_graph=True)[0].flatten(1).norm(dim=1)
        for value in (likeness, loss)
    ]
    return (lengths[0] / (lengths[1] + DELTA)).clamp(max=LARGEST_RATIO).detach()


def adam_state(optimizer: torch.optim.AdamW, parameter: Any) -> dict[str, Tensor]:
    """AdamW's state of a parameter; made before its first step so that it can be loaded into."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state
