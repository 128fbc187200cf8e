"""The solvers integrate what is known: constant, linear and Gaussian fields."""

import math

import pytest
import torch

from sora_train.diffusion.flow import interpolate, velocity_target
from sora_train.diffusion.guidance import guide, guide_both, rescale
from sora_train.diffusion.sampler import sample_ode
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
    condition_scale=1.0,
    guidance_from=0.0,
    guidance_to=1.0,
    guidance_rescale=0.0,
    folded_guidance=0.0,
    time_grid="even",
    time_rounding="none",
    latent_channels=4,
    vae_digest="v",
    vae_dtype="float32",
    vae_normalisation="per_channel",
    text_dtype="float32",
    image_digest="",
    expert="",
    boundary=0.0,
    guidance_scale_2=0.0,
    image_dtype="float32",
    text_digest="t",
    text_padding="masked",
    caption_dropout=0.1,
    conditioning=(("t2v", 1.0),),
    high_noise_share=0.0,
    high_noise_from=0.98,
    weighting="uniform",
    min_snr_gamma=5.0,
    cond_mode="replace",
    condition_noise_share=0.0,
    condition_noise_max=0.1,
    condition_dropout=0.0,
    frame_noise_share=0.0,
    history_frames=13,
    history_noise=0.02,
    history_shift=0.0,
)

SHAPE = (2, 4, 3, 2, 2)


def noise(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc"])
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
    conditions = noise(seed=2)
    mask = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    times = []

    def velocity(z, t_BT):
        times.append(t_BT)
        torch.testing.assert_close(z[0, :, 0], conditions[0, :, 0])
        return torch.ones_like(z)

    got = sample_ode(velocity, noise(), SPEC, condition_latents=conditions, mask_BT=mask)
    torch.testing.assert_close(got[0, :, 0], conditions[0, :, 0])
    torch.testing.assert_close(got[1], noise()[1] - 1)
    assert all(t_BT[0, 0] == 0 < t_BT[0, 1] == t_BT[1, 0] for t_BT in times)
    with pytest.raises(ValueError, match="belong together"):
        sample_ode(velocity, noise(), SPEC, condition_latents=conditions)


def test_guidance_extrapolates_from_the_null():
    v, v_null = noise(seed=1), noise(seed=2)
    torch.testing.assert_close(guide(v, v_null, 1.0), v)
    torch.testing.assert_close(guide(v, v_null, 0.0), v_null)
    torch.testing.assert_close(guide(v, v_null, 4.0), v + 3 * (v - v_null))


# --- guidance ---


def test_two_scales_are_guidance_by_caption_where_the_other_is_one():
    v, v_condition, v_null = noise(seed=1), noise(seed=2), noise(seed=3)
    torch.testing.assert_close(
        guide_both(v, v_condition, v_null, 4.0, 1.0), guide(v, v_condition, 4.0)
    )
    torch.testing.assert_close(
        guide_both(v, v_condition, v_null, 1.0, 3.0), v + 2 * (v_condition - v_null)
    )
    torch.testing.assert_close(guide_both(v, v, v_null, 9.0, 2.0), guide(v, v_null, 2.0))


def test_rescale_takes_back_the_spread_of_what_is_made():
    v, guided = noise(seed=1), 5 * noise(seed=2) + 1
    free = torch.tensor([[0.0, 1, 1], [1, 1, 1]])
    torch.testing.assert_close(rescale(guided, v, 0.0, free), guided)
    whole = rescale(guided, v, 1.0, free)
    for b, first in ((0, 1), (1, 0)):
        spread = whole[b, :, first:].std(correction=0)
        assert spread.item() == pytest.approx(v[b, :, first:].std(correction=0).item())
    half = rescale(guided, v, 0.5, free)
    torch.testing.assert_close(half, (whole + guided) / 2)
    wild = torch.where((free == 0)[:, None, :, None, None], 1e6, guided)
    torch.testing.assert_close(rescale(wild, v, 1.0, free)[:, :, 1:], whole[:, :, 1:])


# --- starting from a clip ---


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc"])
def test_strength_starts_from_the_noised_clip_at_its_own_level(solver):
    source, seen = noise(seed=5), []

    def velocity(z, t_BT):
        seen.append((t_BT[0, 0].item(), z))
        return velocity_target(noise(seed=6), noise())

    spec = SPEC.replace(solver=solver)
    got = sample_ode(
        velocity, noise(), spec, condition_latents=source, strength_T=torch.full((3,), 0.4)
    )
    torch.testing.assert_close(seen[0][1], interpolate(source, noise(), torch.full((2,), 0.4)))
    assert seen[0][0] == pytest.approx(0.4) and len(seen) < spec.num_steps * 2
    # The rest of a straight path to other data: only the share 0.4 of the way is walked.
    torch.testing.assert_close(got, source + 0.4 * (noise(seed=6) - source))


@pytest.mark.parametrize("solver", ["euler", "heun", "unipc"])
def test_each_frame_is_let_go_at_its_own_strength(solver):
    source = noise(seed=5)
    strength = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    times = []

    def velocity(z, t_BT):
        t = t_BT[0, 0].item()
        times.append(t)
        path = interpolate(source, noise(), t_BT)
        torch.testing.assert_close(z[:, :, 0], path[:, :, 0])
        if t > 0.5:
            torch.testing.assert_close(z[:, :, 1], path[:, :, 1])
        return velocity_target(noise(seed=6), noise())

    spec = SPEC.replace(solver=solver, shift=1.0)
    got = sample_ode(velocity, noise(), spec, condition_latents=source, strength_T=strength)
    assert times[0] == pytest.approx(1.0, abs=1e-6) and all(
        t_BT == times[0] or t_BT < 1 for t_BT in times
    )
    assert torch.equal(got[:, :, 0], source[:, :, 0])
    if solver == "euler":
        expected = source + 0.5 * (noise(seed=6) - source)
        torch.testing.assert_close(got[:, :, 1], expected[:, :, 1])
    torch.testing.assert_close(got[:, :, 2], noise(seed=6)[:, :, 2])


def test_strength_zero_everywhere_gives_the_clip_back():
    source = noise(seed=5)
    got = sample_ode(
        torch.zeros_like, noise(), SPEC, condition_latents=source, strength_T=torch.zeros(3)
    )
    assert torch.equal(got, source)


# --- the grid ---


def test_a_non_default_shift_is_what_the_sampler_walks_and_what_training_draws():
    """Drawn uniformly, training's noise levels are spread as the sampler's steps are."""
    spec = SPEC.replace(shift=5.0, num_steps=4)
    seen = []

    def velocity(z, t_BT):
        seen.append(t_BT[0, 0].item())
        return torch.zeros_like(z)

    sample_ode(velocity, noise(), spec)
    drawn = spec.training_times(torch.tensor([0.75, 0.5, 0.25]).double(), SHAPE[2:])
    assert seen == pytest.approx([1.0, *drawn.tolist()])
    assert seen[2] == pytest.approx(5 * 0.5 / (1 + 4 * 0.5))


@pytest.mark.parametrize(
    "change",
    [
        {"solver": "dpm"},
        {"time_grid": "odd"},
        {"time_rounding": "up"},
        {"condition_scale": -1.0},
        {"guidance_rescale": 1.5},
        {"guidance_from": 0.8, "guidance_to": 0.2},
    ],
)
def test_impossible_sampler_settings_are_refused_by_name(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        SPEC.replace(**change)
