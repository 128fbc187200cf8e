"""Path, target, loss, laws of time, conditioning and the spec that binds them."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sora_train.diffusion import timesteps
from sora_train.diffusion.conditioning import KINDS, choose_kind, frame_mask, frame_times
from sora_train.diffusion.flow import (
    data_from_velocity,
    interpolate,
    sample_losses,
    velocity_loss,
    velocity_target,
)
from sora_train.diffusion.spec import DiffusionSpec

SPEC = DiffusionSpec(
    prediction="velocity",
    time_law="logit_normal",
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
    conditioning=(("t2v", 0.7), ("i2v", 0.3)),
)


def clips(batch=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, batch, 4, 5, 2, 3, generator=g, dtype=dtype)


def test_path_runs_from_data_to_noise_at_constant_velocity():
    x, noise, _ = clips()
    assert torch.equal(interpolate(x, noise, torch.zeros(3)), x)
    assert torch.equal(interpolate(x, noise, torch.ones(3)), noise)
    t, dt = torch.full((3,), 0.3, dtype=torch.float64), 1e-3
    slope = (interpolate(x, noise, t + dt) - interpolate(x, noise, t)) / dt
    torch.testing.assert_close(slope, velocity_target(x, noise))
    z = interpolate(x, noise, t)
    torch.testing.assert_close(data_from_velocity(z, velocity_target(x, noise), t), x)


def test_a_time_for_each_frame():
    x, noise, _ = clips()
    t_BT = torch.rand(3, 5, dtype=torch.float64)
    z = interpolate(x, noise, t_BT)
    for b in range(3):
        for f in range(5):
            expected = (1 - t_BT[b, f]) * x[b, :, f] + t_BT[b, f] * noise[b, :, f]
            torch.testing.assert_close(z[b, :, f], expected)


def test_loss_equals_the_slow_reference():
    x, noise, v = clips()
    frames = torch.tensor([[1.0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    samples = torch.tensor([1.0, 1.0, 1.0])
    total, count = 0.0, 0
    for b in range(3):
        errors = [
            (v[b, :, f] - (noise[b, :, f] - x[b, :, f])).square().mean().item()
            for f in range(5)
            if frames[b, f] > 0
        ]
        if errors:
            total, count = total + sum(errors) / len(errors), count + 1
    loss, weight = velocity_loss(v, x, noise, frames, samples)
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert weight.item() == count == 2
    loss, weight = velocity_loss(v, x, noise)
    assert loss.item() == pytest.approx(3 * (v - noise + x).square().mean().item(), rel=1e-12)
    assert weight.item() == 3


def test_loss_adds_up_over_micro_batches():
    x, noise, v = clips()
    whole = velocity_loss(v, x, noise)
    parts = [velocity_loss(v[i : i + 1], x[i : i + 1], noise[i : i + 1]) for i in range(3)]
    for k in range(2):
        torch.testing.assert_close(sum(part[k] for part in parts), whole[k])


def test_given_frames_and_failed_samples_neither_count_nor_get_gradients():
    x, noise, v = clips()
    x[2] = float("nan")
    v.requires_grad_(True)
    frames = torch.ones(3, 5)
    frames[0, 0] = 0
    loss, weight = velocity_loss(v, x, noise, frames, torch.tensor([1.0, 1.0, 0.0]))
    loss.backward()
    assert weight.item() == 2
    assert torch.isfinite(loss)
    assert v.grad[0, :, 0].abs().max() == 0 < v.grad[0, :, 1].abs().min()


def test_loss_is_exact_in_float32_for_bfloat16_predictions():
    x, noise, v = clips(dtype=torch.float32)
    losses, _ = sample_losses(v.bfloat16(), x, noise)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, sample_losses(v.bfloat16().float(), x, noise)[0])


SIZE = (3, 6, 6)
LAWS = {
    "uniform": SPEC.replace(time_law="uniform"),
    "logit_normal": SPEC.replace(time_mean=-0.4, time_std=1.3),
    "mode": SPEC.replace(time_law="mode"),
}


@pytest.mark.parametrize("law", LAWS)
@given(
    a=st.floats(0, 1, exclude_max=True, width=32),
    b=st.floats(0, 1, exclude_max=True, width=32),
    shift=st.floats(0.3, 12),
)
@settings(deadline=None, max_examples=60)
def test_laws_rise_and_stay_inside(law, a, b, shift):
    low, high = (
        LAWS[law]
        .replace(shift=shift)
        .training_times(torch.tensor([min(a, b), max(a, b)]), SIZE)
        .tolist()
    )
    assert 0 <= low <= high + 1e-6
    assert high <= 1


def test_laws_have_their_distributions():
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    logits = torch.logit(timesteps.logit_normal(u, -0.4, 1.3))
    assert logits.mean().item() == pytest.approx(-0.4, abs=1e-3)
    assert logits.std().item() == pytest.approx(1.3, rel=1e-2)
    # The law's own form, at 1 - u: the same set of values.
    form = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u).square() - 1 + u)
    torch.testing.assert_close(timesteps.mode(u, 1.29), form.flip(0))
    assert torch.equal(timesteps.uniform(u), u)


@given(t=st.floats(0, 1), a=st.floats(0.2, 9), b=st.floats(0.2, 9))
@settings(deadline=None, max_examples=60)
def test_shifts_compose_and_keep_the_ends(t, a, b):
    t = torch.tensor(t, dtype=torch.float64)
    torch.testing.assert_close(
        timesteps.shift_t(timesteps.shift_t(t, a), b), timesteps.shift_t(t, a * b)
    )
    torch.testing.assert_close(
        timesteps.shift_t(timesteps.shift_t(t, a), 1 / a), t, rtol=1e-9, atol=1e-12
    )


def test_sampling_grid_is_the_shifted_one():
    grid = SPEC.sampling_times(SIZE)
    assert grid[0] == 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()
    assert grid[5].item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    resolution = SPEC.replace(shift_rule="resolution")
    assert SPEC.shift_for((9, 128, 128)) == 3
    assert resolution.shift_for((1, 32, 32)) == 3
    assert resolution.shift_for((9, 128, 128)) == pytest.approx(27)


@given(
    kind=st.sampled_from(KINDS), num_frames=st.integers(1, 20), u=st.floats(0, 1, exclude_max=True)
)
def test_masks_give_a_head_and_leave_something_to_learn(kind, num_frames, u):
    mask = frame_mask(kind, num_frames, u)
    given_frames = int(mask.sum())
    assert torch.equal(mask, (torch.arange(num_frames) < given_frames).float())
    assert given_frames < num_frames
    if num_frames > 1:
        assert {"t2v": given_frames == 0, "i2v": given_frames == 1, "extend": given_frames >= 1}[
            kind
        ]


def test_kinds_come_in_their_shares_and_unknown_ones_are_refused():
    kinds = [choose_kind(SPEC.conditioning, (i + 0.5) / 1000) for i in range(1000)]
    assert kinds.count("t2v") == 700
    assert kinds.count("i2v") == 300
    with pytest.raises(ValueError, match="tail9"):
        frame_mask("tail9", 3, 0.0)


def test_given_frames_have_their_own_time():
    mask = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    times = frame_times(torch.tensor([0.5, 0.9]), mask, t_cond=0.1)
    torch.testing.assert_close(times, torch.tensor([[0.1, 0.5, 0.5], [0.9, 0.9, 0.9]]))


def test_spec_survives_json_and_is_strict():
    again = DiffusionSpec.from_dict(json.loads(json.dumps(SPEC.to_dict())))
    assert again == SPEC
    assert again.digest() == SPEC.digest() != SPEC.replace(shift=2.0).digest()
    with pytest.raises(ValueError, match=r"unknown keys \['sigma'\]"):
        DiffusionSpec.from_dict(SPEC.to_dict() | {"sigma": 1})
    values = SPEC.to_dict()
    del values["shift"]
    with pytest.raises(ValueError, match=r"missing keys \['shift'\]"):
        DiffusionSpec.from_dict(values)


@pytest.mark.parametrize(
    "change",
    [
        {"prediction": "epsilon"},
        {"solver": "unipc"},
        {"time_std": 0.0},
        {"num_steps": 0},
        {"caption_dropout": 1.5},
        {"conditioning": (("t2v", 0.5),)},
        {"conditioning": (("warp", 1.0),)},
        {"time_law": "mode", "mode_scale": 3.0},
    ],
)
def test_impossible_specs_are_refused(change):
    with pytest.raises(ValueError, match=list(change)[-1]):
        SPEC.replace(**change)
