"""Parameter groups by name, the optimizer, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from sora_train.config import OptimConfig

# Of two dimensions or more, yet no matrices: modulation and look-up tables, and the gains of the VAE's norms.
NOT_DECAYED = {"scale_shift_table", "shared", "relative_attention_bias", "gamma"}


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay acts on matrices and kernels; norms, biases, tables and embeddings are left alone."""
    return parameter.ndim >= 2 and not NOT_DECAYED & set(name.split("."))


def parameter_groups(parameters: dict[str, nn.Parameter], cfg: OptimConfig) -> list[dict]:
    """Four groups at most: (decayed or not) x (text encoder or not), each with its `lr_scale`."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            key = (decays(name, parameter), name.startswith("text_encoder."))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": cfg.weight_decay if decayed else 0.0,
            "lr_scale": cfg.text_lr_scale if is_text else 1.0,
        }
        for (decayed, is_text), parameters in groups.items()
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
