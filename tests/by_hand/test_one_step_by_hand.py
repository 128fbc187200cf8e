"""Steps of the Trainer against the same steps written out (hand_reference.py): loss, norm, learning rate, weights,
averages, validation and samples. Every setting is unequal to its default and to its neighbours, so that two that are
swapped, one that is left out and one that is a step late all show."""

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hand_reference import (
    AdamW,
    Draws,
    Model,
    clip_loss,
    draws_of,
    latents,
    learning_rate,
    power,
    ramped,
    sample,
)
from torch import Tensor, nn

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.sample import Clip
from sora_train.diffusion.draws import draw_noise
from sora_train.parallel.shards import full
from sora_train.sampling import pipeline
from sora_train.sampling.pipeline import ClipShape, sample_clips
from sora_train.training.components import build_model
from sora_train.training.outputs.samples import write_samples
from sora_train.training.recipe import Recipe
from sora_train.training.resilience.spike_detector import SpikeDetector
from sora_train.training.trainer import Trainer

STEPS, LEFT_AFTER = 4, 2
SETTINGS = [
    "seed=3", "parallel.param_dtype=float64", "model.fps_embed=true",
    "data.shapes_image_share=0.3", "train.micro_batches=3", f"train.steps={STEPS + 3}",
    "objective.time_mean=0.4", "objective.time_std=0.8", "objective.shift=1.7",
    "objective.shift_rule=length", "objective.high_noise_share=0.2", "objective.high_noise_from=0.9",
    "objective.weighting=min_snr", "objective.min_snr_gamma=3.0", "objective.caption_dropout=0.3",
    "objective.conditioning.i2v=0.6", "objective.condition_dropout=0.2",
    "objective.condition_noise_share=0.5", "objective.condition_noise_max=0.3",
    "objective.guidance_scale=2.5", "objective.num_steps=3",
    "optim=adamw", "optim.lr=0.02", "optim.betas=[0.7,0.9]", "optim.eps=0.0003",
    "optim.weight_decay=0.3", "optim.text_lr_scale=0.25", "optim.warmup_steps=2",
    "optim.decay=linear", "optim.final_lr_fraction=0.1", "optim.grad_clip=0.06",
    "ema.decay=0.15", "ema.more=[0.9]", "ema.post_hoc=[0.1]",
    "validation.live=true", "validation.kinds=[t2v,i2v]",
]  # fmt: skip


def away_from_zero(cfg: Config) -> nn.Module:
    """The stock model in float64 with a weight of some size everywhere: some begin at zero, where little shows."""
    model = build_model(cfg).double()
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
            parameter.add_(0.05 * drawn)
    return model


def arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: full(value.detach()).double().numpy().copy() for name, value in tensors.items()}


class Step:
    """One step of the Trainer beside the same step by hand."""

    row: dict[str, float]
    loss: float
    norm: float
    lr: float
    drawn: list[Draws]
    weights: tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
    averages: dict[str, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]


class Run:
    """The Trainer's steps and those by hand, from the same weights and clips. After two steps the run is left, and
    another Trainer goes on with it; what is done by hand knows nothing of that."""

    def __init__(self, folder: str):
        overrides = ["experiment=parity_tiny", f"run.dir={folder}", *SETTINGS]
        self.cfg = compose(overrides).config
        self.trainer = self.begin()
        self.vae = self.trainer.vae.autoencoder
        self.batches = [self.trainer.data.step(number) for number in range(STEPS)]
        self.model = Model(self.cfg)
        self.weights = arrays(self.trainer.engine.model_state())
        self.optimizer = AdamW(self.cfg, self.weights)
        self.averages = {
            tag: {name: value.copy() for name, value in self.weights.items()}
            for tag in self.trainer.ema.shadows
        }
        self.steps = [self.step(number) for number in range(1, LEFT_AFTER + 1)]
        self.trainer.save()
        self.trainer.commit()
        self.trainer.close()
        self.left = asdict(self.trainer.state), self.trainer.spikes.state()
        self.trainer = self.begin()
        self.found = asdict(self.trainer.state), self.trainer.spikes.state()
        self.steps += [self.step(number) for number in range(LEFT_AFTER + 1, STEPS + 1)]

    def begin(self) -> Trainer:
        return Trainer(self.cfg, Recipe(model=away_from_zero))

    def step(self, number: int) -> Step:
        step = Step()
        step.row = self.trainer.train_step()
        clips = [clip for batch in self.batches[number - 1] for clip in batch.clips]
        step.loss, step.drawn, grads = self.gradients(clips)
        step.norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
        if step.norm > self.cfg.optim.grad_clip:
            grads = {name: g * self.cfg.optim.grad_clip / step.norm for name, g in grads.items()}
        step.lr = learning_rate(self.cfg, number)
        self.optimizer.step(self.weights, grads, step.lr)
        kept = {"": ramped(0.15, number), "9": ramped(0.9, number), "s1": power(0.1, number)}
        assert kept.keys() == self.averages.keys()
        for tag, shadows in self.averages.items():
            for name in shadows:
                shadows[name] += (1 - kept[tag]) * (self.weights[name] - shadows[name])
        step.weights = arrays(self.trainer.engine.model_state()), copied(self.weights)
        step.averages = {
            tag: (arrays(self.trainer.ema.shadows[tag]), copied(shadows))
            for tag, shadows in self.averages.items()
        }
        return step

    def gradients(self, clips: list[Clip]) -> tuple[float, list[Draws], dict[str, np.ndarray]]:
        self.model.fill(self.weights)
        self.model.zero_grad()
        drawn, sums, total = [], [], 0.0
        for clip in clips:
            x = latents(self.vae, clip.pixels)
            drawn.append(draws_of(self.cfg, clip, tuple(x.shape[2:])))
            loss, weight = clip_loss(self.cfg, self.model, clip, x, drawn[-1])
            sums.append(loss)
            total += weight
        loss = torch.stack(sums).sum() / total
        loss.backward()
        grads = {name: p.grad.numpy().copy() for name, p in self.model.named().items()}
        return float(loss.detach()), drawn, grads


def copied(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.copy() for name, value in weights.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    made = Run(str(tmp_path_factory.mktemp("by_hand") / "run"))
    yield made
    made.trainer.close()


def apart(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest difference, and where it is."""
    assert found.keys() == expected.keys()
    return max((float(np.abs(found[name] - expected[name]).max()), name) for name in found)


def test_the_steps_hold_something_of_everything(run: Run) -> None:
    """Otherwise what follows could not tell."""
    drawn = [one for step in run.steps for one in step.drawn]
    given = [one for one in drawn if one.kind == "i2v"]
    assert len(given) >= 4 and len(drawn) - len(given) >= 4
    assert {one.t_cond > 0 for one in given} == {one.is_high for one in drawn} == {False, True}
    assert {one.prompt == "" for one in drawn} == {False, True}
    clips = [clip for batches in run.batches for batch in batches for clip in batch.clips]
    assert len({clip.epoch for clip in clips}) > 1 and {clip.fps for clip in clips} == {0.0, 8.0}
    clipped = [step.norm > run.cfg.optim.grad_clip for step in run.steps]
    assert set(clipped) == {False, True}, [step.norm for step in run.steps]


def test_what_is_gone_on_with_is_what_was_left(run: Run) -> None:
    """Steps 3 and 4 below are taken by another Trainer; the detector of spikes has judged two steps before."""
    (left, judged), (found, known) = run.left, run.found
    assert known == judged != SpikeDetector(run.cfg.spike_detection).state()
    assert {**found, "spikes": 0} == {**left, "spikes": 0}
    assert (found["step"], found["data_step"]) == (LEFT_AFTER, LEFT_AFTER)
    assert found["samples_seen"] == sum(len(step.drawn) for step in run.steps[:LEFT_AFTER])


def test_loss_norm_and_rate_are_those_by_hand(run: Run) -> None:
    for number, step in enumerate(run.steps, 1):
        assert step.row["train/loss"] == pytest.approx(step.loss, rel=2e-6), number
        assert step.row["train/grad_norm"] == pytest.approx(step.norm, rel=1e-5), number
        assert step.row["train/lr"] == pytest.approx(step.lr, rel=1e-12), number
        assert step.row["train/skipped"] == 0 and step.row["train/clips"] == len(step.drawn)
    assert run.steps[-1].row["train/samples_seen"] == sum(len(step.drawn) for step in run.steps)


def test_weights_are_those_by_hand(run: Run) -> None:
    for number, step in enumerate(run.steps, 1):
        difference, where = apart(*step.weights)
        assert difference <= 5e-4 * step.lr, (number, where)


def test_averages_are_those_by_hand(run: Run) -> None:
    for number, step in enumerate(run.steps, 1):
        for tag, pair in step.averages.items():
            difference, where = apart(*pair)
            assert difference <= 5e-4 * step.lr, (number, tag, where)


def test_validation_is_that_of_the_averaged_weights_by_hand(run: Run) -> None:
    """Clip by clip: noise of its own level's stream, no weighting, the whole caption; `live` of the weights."""
    row, cfg = run.trainer.validate(), run.cfg
    for kind, live in (("t2v", False), ("i2v", False), ("t2v", True)):
        run.model.fill(run.weights if live else run.averages[""])
        losses = []
        for clip in run.trainer.data.val_clips:
            x = latents(run.vae, clip.pixels)
            if kind == "i2v" and x.shape[2] == 1:
                continue
            mask_T = torch.zeros(x.shape[2])
            mask_T[0] = float(kind == "i2v")
            for t in cfg.validation.times:
                key = [(0, clip.row)]
                noise = draw_noise(cfg.seed, f"validation {t}", key, x.shape[1:]).double()
                t_T = torch.where(mask_T > 0, 0.0, t).double()
                z = (1 - t_T.view(1, 1, -1, 1, 1)) * x + t_T.view(1, 1, -1, 1, 1) * noise
                with torch.no_grad():
                    v = run.model(z, t_T, clip.caption, mask_T, clip.fps)
                error_T = (v - (noise - x)).square().mean(dim=(0, 1, 3, 4))
                losses.append(float(error_T[mask_T == 0].mean()))
        name = "val/live/loss" if live else f"val/loss/{kind}"
        assert row[name] == pytest.approx(np.mean(losses), rel=1e-5), name
    assert row["val/loss"] == row["val/loss/t2v"] != row["val/live/loss"]


def test_forty_samples_have_forty_noises_and_are_those_by_hand(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of 16; number i starts from the noise keyed (seed, "sample", 0, i) wherever it stands."""
    cfg, trainer = run.cfg, run.trainer
    assert trainer.spec is not None
    prompts = [f"clip number {number}" for number in range(40)]
    monkeypatch.setattr(pipeline, "decode_clip", lambda vae, latents: latents.double().numpy())
    began: list[Tensor] = []

    def look(_: Any, args: tuple[Any, ...]) -> None:
        if float(args[1].max()) == 1.0:
            began.append(args[0][: len(args[0]) // 2].clone())

    hook = trainer.engine.model.register_forward_pre_hook(look)
    with trainer.parts.averaged():
        made = sample_clips(
            trainer.engine.model, trainer.vae, trainer.spec, prompts, ClipShape(5, 32, 32, 6.0), seed=11
        )  # fmt: skip
    hook.remove()
    noise = torch.cat(began).flatten(1).double()
    assert len(noise) == 40
    alike = torch.corrcoef(noise) - torch.eye(40)
    # Of independent ones over 512 values the correlation has a deviation of 0.044.
    assert float(alike.abs().max()) < 0.3
    run.model.fill(run.averages[""])
    for number in (0, 15, 16, 39):
        z = draw_noise(11, "sample", [(0, number)], (16, 2, 4, 4)).double()
        torch.testing.assert_close(noise[number], z.flatten(), rtol=0, atol=0)
        expected = sample(cfg, run.model, prompts[number], z, 6.0)[0].numpy()
        np.testing.assert_allclose(
            made[number], expected, rtol=0, atol=1e-4 * np.abs(expected).max()
        )


def test_a_runs_own_samples_are_those_of_the_averaged_weights(run: Run) -> None:
    name = "transformer.proj_out.weight"
    seen: list[np.ndarray] = []
    model = run.trainer.engine.model

    def look(module: nn.Module, _: Any) -> None:
        seen.append(full(dict(module.named_parameters())[name].detach()).numpy().copy())

    cfg = run.cfg.model_copy(update={"sample": run.cfg.sample.model_copy(update={"every": 1})})
    hook = model.register_forward_pre_hook(look)
    write_samples(replace(run.trainer.run, cfg=cfg), run.trainer.parts, 7)
    hook.remove()
    average, own = run.averages[""][name], run.weights[name]
    assert seen and all(np.abs(one - average).max() < 1e-5 for one in seen)
    assert np.abs(own - average).max() > 1e-4
