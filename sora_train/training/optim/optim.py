"""Parameter groups by name, the optimizer, and the learning rate as a pure function of the step."""

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sora_train.config import OptimConfig
from sora_train.errors import ConfigError
from sora_train.training.optim.eight_bit import EightBitAdamW
from sora_train.training.optim.muon import Muon, is_matrix, require_matrices
from sora_train.training.optim.schedule_free import ScheduleFreeAdamW

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
    """A group for each weight decay and learning rate, the latter as `lr_scale`."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        key = (cfg.weight_decay if decays(name, parameter) else 0.0, lr_scale(name, cfg))
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), members in groups.items()
    ]


def build_optimizer(
    cfg: OptimConfig, parameters: dict[str, nn.Parameter], placed: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """The optimizer of `optim.name` over the parameters that are trained.

    `placed` has the same names, and says how each parameter lies over the ranks (`OptimizerBuilder`).

    Raises:
        ConfigError: a pattern of `optim.lr_scales` matches nothing, or Muon finds no matrix.
    """
    trained = {name: value for name, value in parameters.items() if value.requires_grad}
    require_matches(list(trained), cfg)
    if cfg.name == "muon":
        matrices = {name: value for name, value in trained.items() if is_matrix(name, value)}
        require_matrices(matrices)
        rest = {name: value for name, value in trained.items() if name not in matrices}
        return Muon(
            parameter_groups(matrices, cfg),
            adamw(parameter_groups(rest, cfg), cfg) if rest else None,
            {value: placed[name] for name, value in matrices.items()},
            cfg,
        )
    groups = parameter_groups(trained, cfg)
    if cfg.name == "schedule_free":
        return ScheduleFreeAdamW(groups, cfg)
    if cfg.state != "float32":
        return EightBitAdamW(groups, {value: placed[name] for name, value in trained.items()}, cfg)
    # Plain, for parity tests.
    return torch.optim.SGD(groups, lr=cfg.lr) if cfg.name == "sgd" else adamw(groups, cfg)


def adamw(groups: list[dict], cfg: OptimConfig) -> torch.optim.AdamW:
    """Loshchilov & Hutter 2019, arXiv:1711.05101."""
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
