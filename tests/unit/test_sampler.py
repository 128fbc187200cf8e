"""The solvers integrate what is known: constant, linear and Gaussian fields."""

import math

import pytest
import torch

from sora_train.diffusion.flow import velocity_target
from sora_train.diffusion.sampler import guide, sample_ode
from sora_train.diffusion.spec import DiffusionSpec

SPEC = DiffusionSpec(
    prediction="velocity",
    time_law="uniform",
    time_mean=0.0,
    time_std=1.0,
    mode_scale=1.29,
    shift=3.0,
    shift_rule="constant",
    num_steps=10,
    guidance_scale=4.0,
    solver="euler",
    latent_channels=4,
    vae_digest="v",
    text_digest="t",
    text_padding="masked",
    caption_dropout=0.1,
    conditioning=(("t2v", 1.0),),
)

SHAPE = (2, 4, 3, 2, 2)


def noise(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 7])
def test_straight_path_arrives_exactly_at_the_data(solver, steps):
    x, end = noise(seed=1), noise()
    v = velocity_target(x, end)
    got = sample_ode(lambda z, t_BT: v, end, SPEC.replace(solver=solver, num_steps=steps))
    torch.testing.assert_close(got, x)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    """dz/dt = 2 z has z(0) = z(1) * exp(-2)."""
    errors = []
    for steps in (32, 64):
        spec = SPEC.replace(solver=solver, num_steps=steps)
        got = sample_ode(lambda z, t_BT: 2 * z, noise(), spec)
        errors.append((got - noise() * math.exp(-2)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_gaussian_data_come_back_with_their_mean_and_spread(solver):
    """For x ~ N(m, s^2): E[noise - x | z_t] is linear in z_t, so the exact velocity is known."""
    mean, std = 1.5, 0.4

    def velocity(z, t_BT):
        t = t_BT[:, None, :, None, None]
        variance = (1 - t) ** 2 * std**2 + t**2
        residual = (z - (1 - t) * mean) / variance
        return (t - (1 - t) * std**2) * residual - mean

    got = sample_ode(velocity, noise((64, 4, 3, 4, 4)), SPEC.replace(solver=solver, num_steps=100))
    assert got.mean().item() == pytest.approx(mean, abs=0.02)
    assert got.std().item() == pytest.approx(std, rel=0.06 if solver == "euler" else 0.03)


def test_time_given_to_the_model_runs_down_the_specs_grid():
    seen = []

    def velocity(z, t_BT):
        assert t_BT.shape == (2, 3)
        seen.append(t_BT[0, 0].item())
        return torch.zeros_like(z)

    done = []
    sample_ode(velocity, noise(), SPEC.replace(num_steps=4), on_step=done.append)
    assert seen == pytest.approx(SPEC.replace(num_steps=4).sampling_times(SHAPE[2:])[:-1].tolist())
    assert done == [1, 2, 3, 4]


def test_given_frames_stay_and_are_shown_clean():
    given = noise(seed=2)
    mask = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    times = []

    def velocity(z, t_BT):
        times.append(t_BT)
        torch.testing.assert_close(z[0, :, 0], given[0, :, 0])
        return torch.ones_like(z)

    got = sample_ode(velocity, noise(), SPEC, given=given, mask_BT=mask)
    torch.testing.assert_close(got[0, :, 0], given[0, :, 0])
    torch.testing.assert_close(got[1], noise()[1] - 1)
    assert all(t_BT[0, 0] == 0 < t_BT[0, 1] == t_BT[1, 0] for t_BT in times)
    with pytest.raises(ValueError, match="belong together"):
        sample_ode(velocity, noise(), SPEC, given=given)


def test_guidance_extrapolates_from_the_null():
    v, v_null = noise(seed=1), noise(seed=2)
    torch.testing.assert_close(guide(v, v_null, 1.0), v)
    torch.testing.assert_close(guide(v, v_null, 0.0), v_null)
    torch.testing.assert_close(guide(v, v_null, 4.0), v + 3 * (v - v_null))
