"""The averages of the weights: what they are, how they are swapped in, and what is made of them afterwards."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentences import refuses
from torch import nn

from sora_train.checkpoint import find, list_checkpoints
from sora_train.checkpoint.layout import prefix_of, tag_of
from sora_train.checkpoint.tensors import StoredTensors
from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.errors import ConfigError, Fault
from sora_train.training.optim.ema import Ema, shadow_of
from sora_train.training.optim.ema_profiles import (
    WIDEST,
    Profile,
    gamma_of,
    mass,
    power_decay,
    sigma_rel_of,
    solve,
    time_grid,
)
from sora_train.training.trainer import Trainer


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2).to(dtype)


@torch.no_grad()
def wander(model: nn.Module, step: int) -> None:
    """Stands for a step of training: other weights, the same at each call."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))


def values(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


# --- what an average is ---


@given(decay=st.floats(0, 0.999), steps=st.integers(1, 40))
def test_an_average_is_the_weighted_sum_of_its_definition(decay: float, steps: int):
    """shadow = sum over t of (1 - d_t) prod over s > t of d_s times the weights of t, in float64."""
    model = model_of()
    ema = Ema(model, decay)
    expected = model.weight.detach().double()
    for step in range(steps):
        wander(model, step)
        ema.update(step)
        kept = min(decay, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * model.weight.detach().double()
    assert torch.allclose(ema.shadow["weight"].double(), expected, atol=1e-5)


def test_the_ramp_is_a_function_of_the_step_alone():
    """An average that begins at step 500, as after a resume, folds in as one that has been there from the start."""
    model = model_of()
    straight, resumed = Ema(model, 0.9999), Ema(model, 0.9999)
    for step in range(500):
        straight.update(step)
    for name, shadow in resumed.shadow.items():
        shadow.copy_(straight.shadow[name])
    for step in range(500, 505):
        wander(model, step)
        straight.update(step)
        resumed.update(step)
    assert torch.equal(straight.shadow["weight"], resumed.shadow["weight"])
    assert straight.decays[""](499) == pytest.approx(500 / 509)
    assert straight.decays[""](10**6) == 0.9999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shadows_are_float32_whatever_the_weights_are(dtype: torch.dtype):
    """In bfloat16 an average of decay 0.999 would stand still: each update is less than its rounding."""
    model = model_of(dtype)
    ema = Ema(model, 0.999)
    assert all(shadow.dtype == torch.float32 for shadow in ema.shadow.values())
    before = ema.shadow["weight"].clone()
    with torch.no_grad():
        model.weight.add_(0.01)
    for step in range(10**6, 10**6 + 5):
        ema.update(step)
    moved = (ema.shadow["weight"] - before) / (model.weight.detach().float() - before)
    assert torch.allclose(moved, torch.full_like(moved, 1 - 0.999**5), rtol=1e-3)


def test_averages_of_several_decays_are_those_kept_alone():
    model = model_of()
    both = Ema(model, 0.999, more=(0.5, 0.0))
    alone = {"": Ema(model, 0.999), "5": Ema(model, 0.5), "0": Ema(model, 0.0)}
    for step in range(30):
        wander(model, step)
        for ema in (both, *alone.values()):
            ema.update(step)
    for tag, ema in alone.items():
        assert torch.equal(both.shadows[tag]["bias"], ema.shadow["bias"]), tag
    assert torch.equal(both.shadows["0"]["bias"], model.bias.detach())
    assert set(both.further_state()) == {"ema_5.weight", "ema_5.bias", "ema_0.weight", "ema_0.bias"}
    assert set(both.state()) == {"weight", "bias"}


def test_tags_have_no_dot_and_are_told_apart():
    assert [tag_of(0.99), tag_of(0.9999), tag_of(0.05, "s"), tag_of(0.1, "s"), tag_of(1e-5)] == [
        "99", "9999", "s05", "s1", "00001",
    ]  # fmt: skip
    assert (prefix_of(""), prefix_of("99")) == ("ema.", "ema_99.")


# --- swapped in ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tag", ["", "5"])
def test_swapped_in_and_back_bit_for_bit(dtype: torch.dtype, tag: str):
    model = model_of(dtype)
    ema = Ema(model, 0.9, more=(0.5,))
    for step in range(3):
        wander(model, step)
        ema.update(step)
    weights, shadows = values(model.state_dict()), values(ema.shadows[tag])
    for raises in (False, True):
        try:
            with ema.swapped_in(model, tag):
                for name, parameter in model.named_parameters():
                    assert torch.equal(parameter, shadows[name].to(dtype))
                if raises:
                    raise KeyError("a failed validation")
        except KeyError:
            assert raises
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[name])
            assert torch.equal(ema.shadows[tag][name], shadows[name])


def test_a_failure_while_swapping_leaves_the_weights_as_they_were():
    model = model_of()
    ema = Ema(model, 0.9)
    wander(model, 1)
    ema.update(20)
    weights, shadow = values(model.state_dict()), values(ema.shadow)
    bias = ema.shadow.pop("bias")
    with pytest.raises(KeyError), ema.swapped_in(model):
        raise AssertionError("not reached")
    ema.shadow["bias"] = bias
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(shadow[name], value) for name, value in ema.shadow.items())
    with ema.swapped_in(model):
        assert torch.equal(model.bias, shadow["bias"])


def test_nothing_is_saved_or_updated_while_an_average_is_swapped_in():
    """What is then in the model are not its weights: a checkpoint would have the two exchanged."""
    model = model_of()
    ema = Ema(model, 0.9)
    with ema.swapped_in(model):
        for act in (ema.state, ema.further_state, lambda: ema.update(0)):
            with pytest.raises(Fault, match="swapped_in"):
                act()
        with pytest.raises(Fault, match="swapped_in"), ema.swapped_in(model):
            pass
    ema.state()


def test_a_shadow_lies_as_its_parameter_does():
    parameter = torch.randn(4, 6).T
    shadow = shadow_of(parameter)
    assert shadow.stride() == parameter.stride() and shadow.data_ptr() != parameter.data_ptr()


# --- power-function averages and post-hoc EMA ---


@given(st.floats(0.01, WIDEST - 1e-3))
def test_width_and_exponent_are_inverse(sigma_rel: float):
    assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-6)


def test_width_is_the_standard_deviation_of_the_profile():
    """sigma_rel is defined as that of tau^gamma on [0, 1] (eq. 123); 6.94 and 16.97 are the paper's."""
    assert gamma_of(0.1) == pytest.approx(6.94, abs=0.005)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    tau = (np.arange(10**5) + 0.5) / 10**5
    weight = tau ** gamma_of(0.1)
    mean = np.average(tau, weights=weight)
    assert math.sqrt(np.average((tau - mean) ** 2, weights=weight)) == pytest.approx(0.1, rel=1e-4)


@given(sigma_rel=st.floats(0.02, 0.28), steps=st.integers(1, 60))
def test_the_update_gives_the_profile(sigma_rel: float, steps: int):
    """Unrolling beta (eq. 127) gives the mass that `mass` states in closed form."""
    held = np.zeros(steps)
    for step in range(steps):
        beta = power_decay(sigma_rel, step)
        held *= beta
        held[step] += 1 - beta
    stated = mass(Profile(sigma_rel, steps), np.arange(steps + 1.0))
    assert held == pytest.approx(stated, abs=1e-12)
    assert stated.sum() == pytest.approx(1)


def track(steps: int, sigma_rel: float, weights: np.ndarray) -> dict[int, np.ndarray]:
    """The average after each step by its recurrence, in float64."""
    average, found = np.zeros_like(weights[0]), {}
    for step in range(steps):
        beta = power_decay(sigma_rel, step)
        average = beta * average + (1 - beta) * weights[step]
        found[step + 1] = average
    return found


def brute_force(wanted: Profile, weights: np.ndarray) -> np.ndarray:
    """The average of all weights there were, by the profile's definition (eq. 2), nothing tracked."""
    gamma, tau = gamma_of(wanted.sigma_rel), np.arange(wanted.steps + 1.0)
    share = np.diff(tau ** (gamma + 1)) / wanted.steps ** (gamma + 1)
    return share @ weights[: wanted.steps]


@given(wanted=st.floats(0.03, 0.28), seed=st.integers(0, 9))
def test_reconstruction_is_the_average_of_all_weights(wanted: float, seed: int):
    """With a snapshot a step the wanted profile is in the span of the stored ones: exact, in float64."""
    steps = 12
    weights = np.random.default_rng(seed).normal(size=(steps, 5))
    stored = [Profile(s, t) for s in (0.05, 0.15) for t in range(1, steps + 1)]
    tracked = {s: track(steps, s, weights) for s in (0.05, 0.15)}
    target = Profile(wanted, steps)
    coefficients, distance = solve(stored, target, cutoff=1e-13)
    made = sum(x * tracked[p.sigma_rel][p.steps] for x, p in zip(coefficients, stored, strict=True))
    assert made == pytest.approx(brute_force(target, weights), abs=1e-8)
    assert distance < 1e-8 and coefficients.sum() == pytest.approx(1)


def test_reconstruction_from_few_snapshots_is_as_near_as_its_profile():
    """Snapshots every 50 of 800 steps, weights that drift: the error is bounded by the profiles' own distance."""
    steps, every = 800, 50
    noise = np.random.default_rng(0).normal(size=(steps, 64))
    weights = np.cumsum(noise, axis=0) / np.arange(1, steps + 1)[:, None]
    stored = [Profile(s, t) for s in (0.05, 0.10) for t in range(every, steps + 1, every)]
    tracked = {s: track(steps, s, weights) for s in (0.05, 0.10)}
    edges = time_grid(stored)
    for sigma_rel in (0.06, 0.08, 0.12, 0.15):
        target = Profile(sigma_rel, steps)
        coefficients, distance = solve(stored, target)
        pairs = list(zip(coefficients, stored, strict=True))
        made = sum(x * tracked[p.sigma_rel][p.steps] for x, p in pairs)
        truth = brute_force(target, weights)
        profile = sum(x * mass(p, edges) for x, p in pairs)
        assert made == pytest.approx(profile @ weights, abs=1e-9)
        assert distance < 0.05
        nearest = min(np.linalg.norm(tracked[s][steps] - truth) for s in (0.05, 0.10))
        assert np.linalg.norm(made - truth) < 0.1 * nearest
    exact, distance = solve(stored, Profile(0.10, steps))
    assert exact[-1] == pytest.approx(1, abs=1e-3) and distance < 1e-3


def test_the_grid_agrees_with_the_integrals_of_the_paper():
    """Inner products on the grid of steps tend to eq. 151, the integrals over continuous time."""

    def integral(a: Profile, b: Profile) -> float:
        if a.steps < b.steps:
            a, b = b, a
        one, other = gamma_of(a.sigma_rel), gamma_of(b.sigma_rel)
        height = (one + 1) * (other + 1) / (one + other + 1) / a.steps
        return height * (b.steps / a.steps) ** one

    a, b = Profile(0.1, 4000), Profile(0.05, 3000)
    edges = np.arange(4001.0)
    for one, other in ((a, b), (a, a), (b, b)):
        assert mass(one, edges) @ mass(other, edges) == pytest.approx(
            integral(one, other), rel=1e-4
        )


def test_the_first_update_forgets_the_initial_weights():
    model = model_of()
    ema = Ema(model, 0.9, post_hoc=(0.1,))
    wander(model, 0)
    ema.update(0)
    assert torch.equal(ema.shadows["s1"]["weight"], model.weight.detach())


# --- in the config and in the run ---


@pytest.mark.parametrize(
    ("override", "facts"),
    [
        ("ema.more=[1.5]", ("ema.more holds 1.5",)),
        ("ema.more=[0.9,0.9]", ("holds a value twice",)),
        ("ema.more=[0.999]", ("ema.decay",)),
        ("ema.post_hoc=[0.4]", ("sigma_rel", "0.001 to 0.288")),
    ],
)
def test_averages_that_cannot_be(override: str, facts: tuple[str, ...], parity_config: Callable):
    with refuses(ConfigError, *facts):
        parity_config(override)


FOUR_STEPS = (
    "train.steps=4", "checkpoint.every=0", "optim=adamw", "optim.warmup_steps=2", "ema.more=[0.5]",
    "ema.post_hoc=[0.1]", "ema.snapshot_every=1",
)  # fmt: skip


def trained(cfg: Config) -> dict[str, torch.Tensor]:
    """Every tensor that a finished run and its snapshots hold."""
    folder = Path(cfg.run.dir)
    found: dict[str, torch.Tensor] = {}
    for place in (find(folder), *list_checkpoints(folder / "ema_snapshots")):
        stored = StoredTensors(place)
        found |= {f"{place.step}.{k}": v for k, v in stored.read(*stored.shapes).items()}
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Four steps in one go, without validation and samples."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    never = ("validation.every=0", "sample.every=0", f"run.dir={folder}")
    cfg = compose(["experiment=parity_tiny", *FOUR_STEPS, *never]).config
    Trainer(cfg).train()
    found = trained(cfg)
    groups = {name.split(".")[1] for name in found if name.startswith("4.")}
    assert groups == {"model", "optim", "ema", "ema_5", "ema_s1"}
    assert {name.split(".")[0] for name in found} == {"1", "2", "3", "4"}
    return found


def test_training_after_validation_is_training_without_it(straight: dict, parity_config: Callable):
    """Validation and samples swap the averages in; four steps with both after each are four steps without, bit
    for bit, weights, moments and every average.
    """
    cfg = parity_config(*FOUR_STEPS, "validation.every=1", "sample.every=1")
    Trainer(cfg).train()
    assert_same(trained(cfg), straight)


class Killed(Exception):
    """Stands for the end of a process."""


class DyingTrainer(Trainer):
    def validate(self) -> dict[str, float]:
        with self.ema.swapped_in(self.engine.model):
            if self.step == 3:
                raise Killed
        return {}


def test_all_averages_and_snapshots_survive_a_kill(straight: dict, parity_config: Callable):
    """Killed in the validation of step 3, one step behind a checkpoint."""
    cfg = parity_config(*FOUR_STEPS, "checkpoint.every=2", "validation.every=3", "sample.every=0")
    with pytest.raises(Killed):
        DyingTrainer(cfg).train()
    Trainer(cfg).train()
    assert_same(trained(cfg), straight)
