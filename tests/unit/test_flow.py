"""Path, target, loss, laws of time, conditioning and the spec that binds them."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import refuses

from sora_train.diffusion import timesteps
from sora_train.diffusion.condition_masks import (
    choose_kind,
    condition_times,
    frame_mask,
    frame_times,
)
from sora_train.diffusion.flow import (
    frame_losses,
    interpolate,
    sample_losses,
    velocity_losses,
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
    conditioning=(("t2v", 0.7), ("i2v", 0.3)),
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


def data_from_velocity(z, v, t):
    """The data a velocity points to."""
    return z - t.view(-1, 1, 1, 1, 1) * v


def velocity_loss(*args, **options):
    """The sum over samples, and how many these are."""
    losses_B, weights_B = velocity_losses(*args, **options)
    return losses_B.sum(), weights_B.sum()


def token_loss(v, x, noise, frames, factor=None):
    """The sum over tokens, six a frame, and how many these are."""
    return frame_losses(v, x, noise, frames, factor).sum() * 6, frames.sum() * 6


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


def test_given_frames_get_no_gradient():
    x, noise, v = clips()
    v.requires_grad_(True)
    frames = torch.ones(3, 5)
    frames[0, 0] = 0
    velocity_loss(v, x, noise, frames)[0].backward()
    assert v.grad[0, :, 0].abs().max() == 0 < v.grad[0, :, 1].abs().min()


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_what_is_left_out_may_hold_anything(data):
    """Loss and gradient of a batch with broken clips and frames of weight 0 are those of the whole ones alone."""
    x, noise, v = clips()
    broken = st.sampled_from([math.nan, math.inf, -math.inf])
    samples = torch.tensor([1.0, data.draw(st.sampled_from([0.0, 1.0])), 0.0])
    frames = torch.tensor(data.draw(st.lists(st.booleans(), min_size=15, max_size=15))).float()
    frames = frames.view(3, 5)
    factor = torch.tensor([0.5, 2.0, 3.0])
    out = (frames * samples[:, None]) == 0
    for part in (x, noise, v):
        part.transpose(1, 2)[out] = data.draw(broken)
    factor[out.all(dim=1)] = data.draw(broken)

    def graded(loss_of, rows, frames):
        given = v[rows].clone().requires_grad_(True)
        loss = loss_of(given, x[rows], noise[rows], frames[rows])
        loss.backward()
        return loss.detach(), given.grad

    whole = [row for row in range(3) if samples[row] > 0]
    losses = {
        "samples": (
            lambda v, x, noise, frames: velocity_loss(v, x, noise, frames, samples, factor)[0],
            lambda v, x, noise, frames: velocity_loss(
                v, x, noise, frames, time_weight=factor[whole]
            )[0],
        ),
        "tokens": (
            lambda v, x, noise, frames: token_loss(v, x, noise, frames * samples[:, None], factor)[
                0
            ],
            lambda v, x, noise, frames: token_loss(v, x, noise, frames, factor[whole])[0],
        ),
    }
    for name, (of_all, of_whole) in losses.items():
        loss, grad = graded(of_all, [0, 1, 2], frames)
        expected, expected_grad = graded(of_whole, whole, frames)
        assert torch.isfinite(grad).all(), name
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0.0)
        torch.testing.assert_close(grad[whole], expected_grad, rtol=1e-12, atol=0.0)
        assert not grad.transpose(1, 2)[out].any(), name


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
    assert SPEC.shift_for((9, 128, 128)) == 3


@pytest.mark.parametrize(
    ("rule", "small", "large"),
    [
        ("constant", 1, 1),
        ("frame", 1, 3),
        ("length", 1, 3),
        ("resolution", 1, 9),
        ("root", 0.5, 6),
    ],
)
def test_shift_rules_at_256_and_4096_tokens_a_frame(rule, small, large):
    spec = SPEC.replace(shift_rule=rule)
    assert spec.shift_for((1, 32, 32)) == pytest.approx(3 * small)
    assert spec.shift_for((9, 128, 128)) == pytest.approx(3 * large)
    grid = spec.sampling_times((9, 128, 128))
    middle = spec.replace(time_law="uniform").training_times(torch.tensor([0.5]), (9, 128, 128))
    assert grid[5].item() == pytest.approx(middle.item()), "training and sampling shift alike"


def test_a_share_of_high_noise_leaves_the_rest_to_the_law():
    u = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    mixed = SPEC.replace(high_noise_share=0.05, high_noise_from=0.98).training_times(u, SIZE)
    law, high = mixed[:9500], mixed[9500:]
    plain = SPEC.training_times((torch.arange(9500, dtype=torch.float64) + 0.5) / 9500, SIZE)
    torch.testing.assert_close(law, plain)
    assert high.min() >= 0.98 and high.max() <= 1
    assert high.mean().item() == pytest.approx(0.99, abs=1e-4), "uniform, and not shifted"
    all_high = SPEC.replace(high_noise_share=1.0).training_times(u, SIZE)
    assert all_high.min() >= 0.98


def test_cosmap_is_that_of_diffusers():
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    t = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        SPEC.replace(weighting="cosmap").loss_weight(t), compute_loss_weighting_for_sd3("cosmap", t)
    )


def test_min_snr_bounds_the_weight_of_the_error_of_the_data():
    """Against its definition: min(snr, gamma) on the squared error of the data that v points to."""
    x, noise, v = clips()
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)
    snr = ((1 - t) / t).square()
    z = interpolate(x, noise, t)
    of_data = (data_from_velocity(z, v, t) - x).square().mean(dim=(1, 2, 3, 4))
    weight = SPEC.replace(weighting="min_snr", min_snr_gamma=5.0).loss_weight(t)
    assert (snr > 5).tolist() == [True, False, False], "both branches are met"
    torch.testing.assert_close(weight * sample_losses(v, x, noise)[0], snr.clamp(max=5.0) * of_data)


def test_a_weighting_scales_losses_and_not_their_weight():
    x, noise, v = clips()
    factor = torch.tensor([2.0, 0.5, 3.0], dtype=torch.float64)
    frames = torch.ones(3, 5)
    frames[1, :2] = 0
    one_by_one = [
        [fn(v[i : i + 1], x[i : i + 1], noise[i : i + 1], frames[i : i + 1]) for i in range(3)]
        for fn in (velocity_loss, token_loss)
    ]
    for parts, found in zip(
        one_by_one,
        (
            velocity_loss(v, x, noise, frames, time_weight=factor),
            token_loss(v, x, noise, frames, factor),
        ),
        strict=True,
    ):
        expected = sum(f * part[0] for f, part in zip(factor, parts, strict=True))
        torch.testing.assert_close(found[0], expected)
        assert found[1].item() == sum(part[1].item() for part in parts)
    assert torch.equal(SPEC.loss_weight(factor), torch.ones(3, dtype=torch.float64))


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
    each = frame_times(torch.tensor([0.5, 0.9]), torch.ones(2, 3), torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(each, torch.tensor([[0.1] * 3, [0.2] * 3]))


def test_given_frames_carry_noise_in_their_share():
    u = torch.rand(2, 4000, generator=torch.Generator().manual_seed(0))
    t = condition_times(u[0], u[1], 0.25, 0.2)
    assert abs((t > 0).float().mean().item() - 0.25) < 0.03
    assert t.max() < 0.2
    assert t[t > 0].mean().item() == pytest.approx(0.1, abs=0.01)
    assert not condition_times(u[0], u[1], 0.0, 0.2).any()


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
        {"solver": "dpm"},
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


def test_a_spec_of_the_first_version_says_what_it_meant_then():
    """Files written before a field existed; a field lost from a newer file is still an error."""
    new = {"high_noise_share", "high_noise_from", "weighting", "min_snr_gamma", "cond_mode"}
    new |= {"condition_noise_share", "condition_noise_max", "condition_dropout"}
    new |= {"condition_scale", "guidance_from", "guidance_to", "guidance_rescale"}
    new |= {"time_grid", "time_rounding"}
    new |= {"frame_noise_share", "history_frames", "history_noise", "history_shift"}
    old = {k: v for k, v in SPEC.to_dict().items() if k not in {*new, "version"}}
    spec = DiffusionSpec.from_dict(json.loads(json.dumps(old)))
    assert spec == SPEC
    assert spec.to_dict()["version"] == 4
    u = torch.rand(50, generator=torch.Generator().manual_seed(0))
    plain = timesteps.shift_t(timesteps.logit_normal(u, 0.0, 1.0), 3.0)
    assert torch.equal(spec.training_times(u, SIZE), plain), "bit for bit what it was"
    with pytest.raises(ValueError, match=r"missing keys \['weighting'\]"):
        DiffusionSpec.from_dict({k: v for k, v in SPEC.to_dict().items() if k != "weighting"})
    with pytest.raises(ValueError, match="missing keys \\['shift'\\]"):
        DiffusionSpec.from_dict({k: v for k, v in old.items() if k != "shift"})
    with pytest.raises(ValueError, match="of version 9"):
        DiffusionSpec.from_dict(SPEC.to_dict() | {"version": 9})


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"weighting": "snr"}, ("weighting is 'snr'",)),
        ({"cond_mode": "add"}, ("cond_mode", "'add'")),
        ({"condition_noise_share": 1.5}, ("condition_noise_share", "1.5")),
        ({"high_noise_share": -0.1}, ("high_noise_share", "-0.1")),
        ({"condition_dropout": 2.0}, ("condition_dropout is 2.0",)),
        ({"min_snr_gamma": 0.0}, ("min_snr_gamma", "0.0")),
        ({"frame_noise_share": 1.1}, ("frame_noise_share", "1.1")),
        ({"history_noise": -0.1}, ("history_noise", "-0.1")),
        ({"history_frames": 0}, ("history_frames", "0")),
        ({"history_shift": -1.0}, ("history_shift", "-1.0")),
    ],
)
def test_impossible_values_are_refused_by_name(change, facts):
    with refuses(ValueError, *facts):
        SPEC.replace(**change)
