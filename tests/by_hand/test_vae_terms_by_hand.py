"""The autoencoder's terms against sums written out in numpy, for a reconstruction and moments that are given."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sora_train.config.compose import compose
from sora_train.data.sample import Bucket, Clip, ClipBatch, MicroBatch
from sora_train.diffusion.draws import draw_noise
from sora_train.objectives import VaeObjective

WEIGHTS = {"mse": 0.7, "l1": 0.3, "kl": 0.02, "gradient": 0.5}
FRAMES, HEIGHT, WIDTH = 5, 16, 24


class Given(nn.Module):
    """An autoencoder whose answer is known: nothing of the package's own networks has a part."""

    def __init__(self, seed: int):
        super().__init__()
        draws = np.random.default_rng(seed)
        self.answer = draws.normal(size=(2, 3, FRAMES, HEIGHT, WIDTH))
        self.mean = draws.normal(size=(2, 4, 2, 2, 3))
        self.logvar = draws.normal(size=(2, 4, 2, 2, 3))
        self.noise: Tensor | None = None

    def forward(self, pixels: Tensor, noise: Callable) -> tuple[Tensor, ...]:
        self.noise = noise(self.mean.shape[1:])
        answers = (self.answer, self.mean, self.logvar)
        return tuple(torch.from_numpy(value).float().requires_grad_() for value in answers)


def test_each_term_is_its_formula_clip_by_clip() -> None:
    overrides = [f"vae_objective.{name}={value}" for name, value in WEIGHTS.items()]
    cfg = compose(["experiment=tiny_vae", "seed=9", *overrides]).config
    objective, model = VaeObjective(cfg, torch.device("cpu")), Given(0)
    shown = np.random.default_rng(1).integers(0, 256, (2, FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    keys = [(3, 11), (4, 12)]
    clips = [
        Clip(row, epoch, pixels, None, 8.0, "", "")
        for (epoch, row), pixels in zip(keys, shown, strict=True)
    ]
    entry = MicroBatch(0, Bucket(FRAMES, HEIGHT, WIDTH), 3, (11, 12), (3, 4))
    terms = objective.terms(model, ClipBatch(entry, clips, [], 2.0))

    error = model.answer - (shown.transpose(0, 4, 1, 2, 3) / 127.5 - 1)
    each = (1, 2, 3, 4)
    variance = np.exp(model.logvar)
    expected = {
        "mse": (error**2).mean(each),
        "l1": np.abs(error).mean(each),
        # KL of a Gaussian from the unit Gaussian: (m^2 + v - 1 - log v) / 2.
        "kl": ((model.mean**2 + variance - 1 - model.logvar) / 2).mean(each),
        # |d/dt|, |d/dy| and |d/dx| of the error, each averaged over its own values.
        "gradient": sum(np.abs(np.diff(error, axis=axis)).mean(each) for axis in (2, 3, 4)),
    }
    assert (
        terms.keys()
        == expected.keys()
        == objective.weights(ClipBatch(entry, clips, [], 2.0)).keys()
    )
    for name, values in expected.items():
        term = terms[name]
        assert term.per_sample is not None and term.weight == 2.0
        assert term.per_sample.tolist() == pytest.approx(WEIGHTS[name] * values, rel=1e-5), name
        assert float(term.sum) == pytest.approx(WEIGHTS[name] * values.sum(), rel=1e-5), name
    drawn = torch.cat([draw_noise(9, "posterior", [key], (4, 2, 2, 3)) for key in keys])
    assert model.noise is not None and torch.equal(model.noise, drawn)
