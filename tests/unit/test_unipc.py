"""Ours beside diffusers' schedulers: the same grids, and the same latents after every step."""

import math

import diffusers
import numpy as np
import pytest
import torch
from test_sampler import SPEC

from sora_train.diffusion.sampler import sample_ode
from sora_train.diffusion.timesteps import sampling_times, shown_time

SHAPE = (1, 2, 3, 4, 4)
MEAN, STD = 0.7, 0.4


def unipc(shift):
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def flow_match_euler(shift):
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)


def noise():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def velocity(z, t):
    """The exact one for data ~ N(MEAN, STD^2): E[noise - x | z_t]."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) * (z - (1 - t) * MEAN) / variance - MEAN


@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.5])
@pytest.mark.parametrize(
    ("grid", "make"), [("unipc", unipc), ("flow_match_euler", flow_match_euler)]
)
def test_the_grid_is_the_schedulers(grid, make, shift, num_steps):
    theirs = make(shift)
    theirs.set_timesteps(num_steps)
    ours = sampling_times(num_steps, shift, grid)
    torch.testing.assert_close(ours.float(), theirs.sigmas, rtol=0, atol=1e-7)
    rounding = "truncate" if grid == "unipc" else "none"
    shown = [1000 * shown_time(t, rounding) for t in ours[:-1].tolist()]
    np.testing.assert_allclose(shown, theirs.timesteps.double().numpy(), atol=2e-4)


def test_the_two_grids_and_the_even_one_differ():
    """Or the comparisons above would say little."""
    even, first, second = (
        sampling_times(10, 3.0, grid) for grid in ("even", "unipc", "flow_match_euler")
    )
    assert (even - first).abs().max() > 1e-4 and (even - second).abs().max() > 0.01
    assert shown_time(0.7504, "truncate") == 0.75 and shown_time(0.7504, "none") == 0.7504


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize(("solver", "make"), [("unipc", unipc), ("euler", flow_match_euler)])
def test_every_step_is_the_schedulers(solver, make, num_steps):
    theirs = make(3.0)
    theirs.set_timesteps(num_steps)
    seen, asked = [], []
    spec = SPEC.replace(
        solver=solver,
        num_steps=num_steps,
        time_grid="unipc" if solver == "unipc" else "flow_match_euler",
        time_rounding="truncate" if solver == "unipc" else "none",
    )

    def ours(z, t_BT):
        seen.append(z)
        asked.append(t_BT[0, 0].item())
        return velocity(z, t_BT[0, 0].item())

    seen.append(sample_ode(ours, noise(), spec))
    z = noise().float()
    for i, timestep in enumerate(theirs.timesteps):
        torch.testing.assert_close(seen[i].float(), z, rtol=0, atol=2e-5)
        assert asked[i] == pytest.approx(timestep.item() / 1000, abs=1e-6)
        z = theirs.step(velocity(z, timestep.item() / 1000), timestep, z, return_dict=False)[0]
    torch.testing.assert_close(seen[-1].float(), z, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("unipc", 2)])
def test_order_of_convergence_towards_gaussian_data(solver, order):
    """The flow carries noise straight to MEAN + STD * noise."""
    errors = []
    for steps in (64, 128):
        spec = SPEC.replace(solver=solver, num_steps=steps, shift=1.0)
        got = sample_ode(lambda z, t_BT: velocity(z, t_BT[0, 0].item()), noise(), spec)
        errors.append((got - MEAN - STD * noise()).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)
    if solver == "unipc":
        assert errors[1] < 5e-4
