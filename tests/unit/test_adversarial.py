"""The adversarial term: its losses, its start, what it may touch, and that it is nobody else's business."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sentences import refuses
from torch import nn

from sora_train.config.compose import compose
from sora_train.data.sample import Bucket, Clip, ClipBatch, MicroBatch
from sora_train.errors import ConfigError, Fault
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.vae.discriminator import (
    Discriminator,
    accuracy,
    discriminator_loss,
    generator_loss,
    smallest_side,
)
from sora_train.monitoring.metrics import read_metrics
from sora_train.monitoring.report.run_charts import training_charts
from sora_train.objectives import VaeObjective
from sora_train.objectives.adversary import Adversary, gradient_ratio
from sora_train.training.trainer import Trainer

CPU = torch.device("cpu")
SMALL = ("task=vae", "vae_objective.disc_layers=2", "vae_objective.disc_channels=8")
ON = (*SMALL, "vae_objective.adversarial=0.5")


def config(*overrides: str):
    return compose(["experiment=parity_tiny", *ON, *overrides]).config


def clips(count: int, frames: int = 5, size: int = 32) -> torch.Tensor:
    shape = (count, 3, frames, size, size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(count)) * 2 - 1


def batch(count: int, frames: int = 5) -> ClipBatch:
    pixels = ((clips(count, frames) + 1) * 127.5).byte().permute(0, 2, 3, 4, 1).numpy()
    found = [Clip(i, 0, pixels[i], None, 8.0, "", "") for i in range(count)]
    micro = MicroBatch(0, Bucket(frames, 32, 32), 0, tuple(range(count)), (0,) * count)
    return ClipBatch(micro, found, [], float(count))


# --- the discriminator ---


def test_losses_are_the_hinge() -> None:
    real, made = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.0]])
    assert discriminator_loss(real, made).tolist() == [0.5 * (0.25 + 0.5)]
    assert generator_loss(made).tolist() == [1.5]
    assert accuracy(real, made).tolist() == [0.75]


@pytest.mark.parametrize("frames", [1, 2, 5, 9])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_it_answers_at_any_length_and_down_to_the_smallest_size(frames: int, layers: int) -> None:
    side = smallest_side(layers)
    model = Discriminator(8, layers, seed=0)
    assert model(clips(1, frames, side)).shape[-2:] == (1, 1)
    with pytest.raises(RuntimeError):
        model(clips(1, frames, side - 2**layers))


def test_two_clips_are_two_batches_of_one() -> None:
    model, both = Discriminator(8, 2, seed=0).double(), clips(2).double()
    alone = torch.cat([model(both[:1]), model(both[1:])])
    assert torch.allclose(model(both), alone, rtol=1e-12, atol=1e-14)


def test_its_first_weights_are_the_seeds() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    one, same, other = (Discriminator(8, 2, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["layers.0.weight"], other["layers.0.weight"])


# --- what it may touch, and when ---


def test_it_idles_then_learns_alone_then_acts() -> None:
    cfg = config("vae_objective.adversarial_from=3", "vae_objective.adversarial_warmup=1")
    goal = VaeObjective(cfg, CPU)
    assert goal.adversary is not None
    vae = VideoVAE.from_config(cfg.vae, trainable=True, seed=0)
    said = []
    for _ in range(4):
        before = [p.detach().clone() for p in goal.adversary.discriminator.parameters()]
        terms = goal.terms(vae, batch(1))
        row = goal.step()
        now = goal.adversary.discriminator.parameters()
        moved = any(not torch.equal(a, b) for a, b in zip(before, now, strict=True))
        said.append(("adversarial" in terms, "train/disc/loss" in row, moved))
    assert said == [(False, False, False)] * 2 + [(False, True, True), (True, True, True)]


def test_before_it_acts_the_autoencoder_knows_nothing_of_it(parity_config: Callable) -> None:
    """And with a weight of 0 there is none: the very same numbers."""
    steps = ("task=vae", "train.steps=2", "validation.every=0")
    late = ("vae_objective.adversarial_from=1", "vae_objective.adversarial_warmup=1")
    plain = parity_config(*steps, name="plain")
    waiting = parity_config(*steps, *ON, *late, name="waiting")
    for cfg in (plain, waiting):
        Trainer(cfg).train()
    a, b = (read_metrics(Path(cfg.run.dir) / "metrics.jsonl") for cfg in (plain, waiting))
    assert a[0]["train/loss"] == b[0]["train/loss"]
    assert a[0]["train/grad_norm"] == b[0]["train/grad_norm"]
    assert a[1]["train/loss/mse"] == b[1]["train/loss/mse"]
    assert a[1]["train/loss"] != b[1]["train/loss"]
    assert not [name for row in a for name in row if "disc" in name]
    titles = [title for title, _ in training_charts(b)]
    assert any("discriminator" in title for title in titles)


def test_each_side_gets_its_own_gradient_alone() -> None:
    adversary = Adversary(config(), CPU)
    made = clips(2).requires_grad_()
    adversary.learn(clips(2), made)
    assert made.grad is None
    grads = [p.grad.clone() for p in adversary.named.values() if p.grad is not None]
    assert len(grads) == len(adversary.named)
    adversary.error(made, None).sum().backward()
    assert made.grad is not None and made.grad.abs().sum() > 0
    assert all(torch.equal(p.grad, g) for p, g in zip(adversary.named.values(), grads, strict=True))


def test_a_skipped_step_changes_nothing() -> None:
    adversary = Adversary(config(), CPU)
    before = {name: value.clone() for name, value in adversary.tensors().items()}
    adversary.learn(clips(2), clips(2).flip(0))
    adversary.skip()
    assert all(torch.equal(before[name], value) for name, value in adversary.tensors().items())
    # What was gathered for it is not in the next one either.
    fresh = Adversary(config(), CPU)
    for one in (adversary, fresh):
        one.learn(clips(1), clips(1).flip(2))
    assert adversary.step() == fresh.step()


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    adversary = Adversary(config(), CPU)
    before = {name: value.clone() for name, value in adversary.tensors().items()}
    adversary.learn(clips(1), clips(1) * torch.nan)
    with refuses(Fault, "discriminator", "nan", "vae_objective.disc_lr"):
        adversary.step()
    assert all(torch.equal(before[name], value) for name, value in adversary.tensors().items())


def test_micro_batches_add_up() -> None:
    """Two of one clip are one of two: gradients are sums over clips, divided once."""
    whole, parts = (Adversary(config("optim=sgd", "vae_objective.disc_lr=0.1"), CPU) for _ in "ab")
    real, made = clips(2), clips(2).flip(3)
    whole.learn(real, made)
    for i in range(2):
        parts.learn(real[i : i + 1], made[i : i + 1])
    assert whole.step() == pytest.approx(parts.step(), rel=1e-5)
    for name, value in whole.tensors().items():
        assert torch.allclose(parts.tensors()[name], value, rtol=1e-5, atol=1e-7), name


def test_an_idle_slot_adds_nothing() -> None:
    goal = VaeObjective(config(), CPU)
    vae = VideoVAE.from_config(goal_cfg := config().vae, trainable=True, seed=0)
    assert goal_cfg is not None and goal.adversary is not None
    micro = MicroBatch(0, Bucket(5, 32, 32), 0, (), ())
    terms = goal.terms(vae, ClipBatch(micro, [], [], 0.0))
    assert all(float(term.sum.detach()) == 0 and term.weight == 0 for term in terms.values())
    assert all(parameter.grad is None for parameter in goal.adversary.named.values())


# --- the adaptive weight ---


def test_the_ratio_is_that_of_the_gradients() -> None:
    at = clips(2).double().requires_grad_()
    likeness = 3 * at.flatten(1).sum(dim=1)
    loss = torch.tensor([1.0, 6.0]).double() * at.flatten(1).sum(dim=1)
    assert gradient_ratio(likeness, loss, at).tolist() == pytest.approx([3.0, 0.5], rel=1e-5)


def test_weighted_so_both_pull_alike() -> None:
    """With it the adversarial gradient of each clip is as long as that of the rest, times its weight."""
    cfg = config("vae_objective.kl=0")
    goal = VaeObjective(cfg, CPU)
    made = (clips(2) * 0.9).requires_grad_()

    class Fixed(nn.Module):
        def forward(self, pixels, draw_noise):
            return made, torch.zeros(2, 1), torch.zeros(2, 1)

    terms = goal.terms(Fixed(), batch(2))
    rest = sum(term.sum for name, term in terms.items() if name != "adversarial")
    lengths = [
        torch.autograd.grad(value, made, retain_graph=True)[0].flatten(1).norm(dim=1)
        for value in (rest, terms["adversarial"].sum)
    ]
    assert torch.allclose(lengths[1], 0.5 * lengths[0], rtol=1e-3)


# --- bad input ---


@pytest.mark.parametrize(
    ("overrides", "facts"),
    [
        (["vae_objective.lpips=0.1"], ("vae_objective.lpips_path", "empty")),
        (["vae_objective.adversarial=1", "vae_objective.adversarial_from=6"],
         ("adversarial_from=6", "train.steps=6")),
        (["vae_objective.adversarial=1", "vae_objective.adversarial_warmup=2"], ("before step 0",)),
        (["task=text_to_video", "vae_objective.adversarial=1"], ("adversarial=1", "task=vae")),
        (["task=text_to_video", "vae_objective.lpips=1", "vae_objective.lpips_path=x"], ("lpips=1", "task=vae")),
        (["vae_objective.adversarial=1", "vae_objective.mse=0", "vae_objective.l1=0", "vae_objective.gradient=0"],
         ("all 0",)),
        (["vae_objective.disc_channels=12"], ("disc_channels",)),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(overrides: list[str], facts: tuple[str, ...]) -> None:
    with refuses(ConfigError, *facts):
        compose(["experiment=parity_tiny", "task=vae", *overrides])


def test_a_start_beyond_the_epochs_is_refused(parity_config: Callable) -> None:
    epochs = ("train.steps=0", "train.epochs=1", "vae_objective.adversarial_from=1000")
    with refuses(ConfigError, "adversarial_from=1000", "train.steps"):
        Trainer(parity_config(*ON, *epochs))


def test_frames_too_small_for_it_are_told() -> None:
    adversary = Adversary(config("vae_objective.disc_layers=4"), CPU)
    with refuses(ConfigError, "disc_layers=4", "48"):
        adversary.learn(clips(1), clips(1))
