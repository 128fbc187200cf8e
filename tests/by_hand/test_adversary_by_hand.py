"""The discriminator's steps against AdamW written out, with its own rate and betas, on gradients that are given."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hand_reference import AdamW

from sora_train.config.compose import compose
from sora_train.objectives.adversary import Adversary

SETTINGS = [
    "experiment=tiny_vae", "optim=adamw", "optim.lr=0.5", "optim.betas=[0.1,0.2]", "optim.weight_decay=0.7",
    "vae_objective.adversarial=0.05", "vae_objective.disc_lr=0.003", "vae_objective.disc_betas=[0.3,0.8]",
    "vae_objective.disc_channels=8", "vae_objective.disc_layers=1",
]  # fmt: skip


def test_it_learns_by_the_mean_gradient_of_the_clips() -> None:
    adversary = Adversary(compose(SETTINGS).config, torch.device("cpu"))
    weights = {name: p.detach().double().numpy() for name, p in adversary.named.items()}
    settings: Any = SimpleNamespace(
        optim=SimpleNamespace(betas=(0.3, 0.8), eps=1e-8, weight_decay=0.0, text_lr_scale=1.0)
    )
    weights = {name: value.copy() for name, value in weights.items()}
    reference, draws = AdamW(settings, weights), np.random.default_rng(0)
    for clips in (3, 5):
        sums = {name: draws.normal(size=value.shape) for name, value in weights.items()}
        for name, parameter in adversary.named.items():
            parameter.grad = torch.from_numpy(sums[name]).float()
        adversary.counted |= {"clips": float(clips), "loss": 2.0 * clips, "accuracy": clips / 4}
        row = adversary.step()
        means = {name: value / clips for name, value in sums.items()}
        reference.step(weights, means, 0.003)
        for name, parameter in adversary.named.items():
            np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=0, atol=1e-6)
        norm = sum(float((value**2).sum()) for value in means.values()) ** 0.5
        assert row["train/disc/grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert (row["train/disc/loss"], row["train/disc/accuracy"]) == pytest.approx((2.0, 0.25))
    assert int(adversary.steps) == 2
