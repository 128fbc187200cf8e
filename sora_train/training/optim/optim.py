"""Parameter groups by name, the optimizer, and the learning rate as a pure function of the step."""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import nn

from sora_train.config import OptimConfig
from sora_train.errors import ConfigError

# Of two dimensions or more, yet no matrices: modulation and look-up tables, and the gains of the VAE's norms.
NOT_DECAYED = {"scale_shift_table", "shared", "relative_attention_bias", "gamma"}


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay acts on matrices and kernels; norms, biases, tables and embeddings are left alone."""
    return parameter.ndim >= 2 and not NOT_DECAYED & set(name.split("."))


def lr_scale(name: str, cfg: OptimConfig) -> float:
    """The factor on a parameter's learning rate: the product of all that its name matches."""
    is_text = name.startswith("text_encoder.")
    factors = [factor for pattern, factor in cfg.lr_scales.items() if fnmatchcase(name, pattern)]
    return math.prod([cfg.text_lr_scale if is_text else 1.0, *factors])


def require_matches(names: Sequence[str], cfg: OptimConfig) -> None:
    """Raises ConfigError for the first pattern of `optim.lr_scales` that matches no trained parameter."""
    for pattern in cfg.lr_scales:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ConfigError(
                f"optim.lr_scales has the pattern {pattern!r}, which no trained parameter's whole name matches; near "
                f"it are {', '.join(near)}; write one of them with * for what varies"
            )


def parameter_groups(parameters: dict[str, nn.Parameter], cfg: OptimConfig) -> list[dict]:
    """A group for each weight decay and learning rate, the latter as `lr_scale`. Raises as `require_matches`."""
    trained = {name: value for name, value in parameters.items() if value.requires_grad}
    require_matches(list(trained), cfg)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        key = (cfg.weight_decay if decays(name, parameter) else 0.0, lr_scale(name, cfg))
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), members in groups.items()
    ]


def build_optimizer(parameters: dict[str, nn.Parameter], cfg: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), or plain SGD for parity tests."""
    groups = parameter_groups(parameters, cfg)
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=cfg.lr)
    beta1, beta2 = cfg.betas
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(beta1, beta2), eps=cfg.eps, fused=True)


def lr_at(step: int, steps: int, cfg: OptimConfig) -> float:
    """Learning rate of step `step` (0-based) of `steps`: linear warm-up, then the chosen decay."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, steps - cfg.warmup_steps)
    share = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[cfg.decay]
    if cfg.decay == "constant":
        return cfg.lr
    return cfg.lr * (cfg.final_lr_fraction + (1.0 - cfg.final_lr_fraction) * share)
