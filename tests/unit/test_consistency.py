"""Distillation has the right end: on data whose flow is known in closed form, and with guidance folded in.

For one point c of data the velocity is (z - c) / t and every trajectory ends at c. For Gaussian data of deviation S the
noisy data have variance q(t) = (1 - t)^2 S^2 + t^2, the velocity is z q'(t) / 2 q(t), and the trajectory through z at t
ends at z S / sqrt(q(t)).
"""

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.data.sample import Bucket, Clip, ClipBatch, MicroBatch
from sora_train.diffusion.guidance import guide
from sora_train.errors import ConfigError
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.objectives import ConsistencyObjective, FlowBatch, Teacher
from sora_train.objectives.spec import spec_of

SIZE = (3, 4, 4)
CPU = torch.device("cpu")


class Flow(nn.Module):
    """A velocity in closed form, for captioned clips and for the empty caption."""

    takes_mask = False

    def __init__(
        self,
        velocity: Callable[[Tensor, Tensor], Tensor],
        null: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.velocity, self.null = velocity, null or velocity

    def forward(self, z, t_BT, text, *, mask_BT=None, fps_B=None):
        t = t_BT[:, None, :, None, None].to(z)
        with_caption = text[0].view(-1, 1, 1, 1, 1) > 0
        return torch.where(with_caption, self.velocity(z, t), self.null(z, t))

    def tokenize(self, prompts):
        return torch.tensor([float(len(prompt)) for prompt in prompts]), None

    def embed(self, prompts, stored, sharing):
        return self.tokenize(prompts)

    def text_digest(self):
        return ""


@functools.cache
def composed(*overrides: str) -> tuple[Config, VideoVAE]:
    asked = ["experiment=parity_tiny", "distill.teacher=none", "objective.guidance_scale=1"]
    cfg = compose([*asked, *overrides]).config
    return cfg, VideoVAE.from_config(cfg.vae)


def objective(teacher: nn.Module, *overrides: str, **guidance: float) -> ConsistencyObjective:
    """With a teacher of its own, guided as `guidance` says (not at all)."""
    cfg, vae = composed(*overrides)
    spec = spec_of(cfg, vae, "")
    guided = {"guidance_scale": 1.0, **guidance}
    taught = Teacher(teacher, spec.replace(folded_guidance=0.0, **guided), "digest")
    return ConsistencyObjective(cfg, spec, vae, CPU, teacher=taught)


def batch(t_B: Tensor, mask_T: tuple[int, ...] = (0, 0, 0), seed: int = 0) -> FlowBatch:
    """Noisy latents in float64, of which the frames of `mask_T` are given."""
    draw = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, len(t_B), 2, *SIZE, generator=draw, dtype=torch.float64)
    mask_BT = torch.tensor(mask_T, dtype=torch.float64).expand(len(t_B), -1)
    return FlowBatch(x, noise, t_B, mask_BT, ["said"] * len(t_B), torch.full((len(t_B),), 8.0))


def one_point(c: float) -> Flow:
    return Flow(lambda z, t: (z - c) / t)


@settings(deadline=None, max_examples=20)
@given(
    c=st.floats(-3, 3),
    t=st.lists(st.floats(0.05, 1), min_size=1, max_size=4),
    n=st.sampled_from([1, 3, 8]),
)
def test_of_one_point_of_data_every_noise_level_is_led_to_it(c, t, n):
    flow = batch(torch.tensor(t, dtype=torch.float64))
    student = one_point(c)
    path = objective(one_point(c), f"distill.levels={n}").towards(student, flow)
    # The path's data are the end of the trajectory, and its z is the batch's.
    torch.testing.assert_close(path.x, torch.full_like(path.x, c), rtol=0, atol=1e-6)
    t5 = flow.t_B.view(-1, 1, 1, 1, 1)
    z = (1 - t5) * flow.x + t5 * flow.noise
    torch.testing.assert_close((1 - t5) * path.x + t5 * path.noise, z, rtol=0, atol=1e-6)
    assert float(path.losses(student).detach().max()) < 1e-10


@pytest.mark.parametrize("deviation", [0.3, 2.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_on_gaussian_data_the_levels_upwards_converge_to_the_end_of_the_ode(deviation, shift):
    """The student is a table of factors, u = k(t) z, filled from the lowest level up with what its targets are."""

    def q(t: Tensor) -> Tensor:
        return (1 - t).square() * deviation**2 + t.square()

    teacher = Flow(lambda z, t: z * (t - (1 - t) * deviation**2) / q(t))
    found: dict[int, float] = {}
    for count in (64, 256):
        taught = objective(teacher, f"distill.levels={count}", f"objective.shift={shift}")
        levels = taught.levels(SIZE)
        table: dict[float, float] = {}
        student = Flow(lambda z, t, table=table: z * table[float(t.flatten()[0])])
        for t in levels:
            flow = batch(t.view(1))
            path = taught.towards(student, flow)
            z = (1 - t) * flow.x + t * flow.noise
            factor = (path.noise - path.x) / z
            table[float(t)] = float(factor.median())
            assert float((factor - factor.median()).abs().max()) < 1e-4
        # f(z, 1) = z - u(z, 1): at t = 1 the variance is 1, and the trajectory ends at S z.
        found[count] = 1 - table[1.0]
    assert found[256] == pytest.approx(deviation, rel=0.02)
    # Euler's method is of first order: four times the levels leave a fourth of the error.
    error = {count: abs(end - deviation) for count, end in found.items()}
    assert error[256] < 0.35 * error[64]


def test_guidance_of_the_teacher_is_folded_into_the_target_inside_its_interval_alone():
    teacher = Flow(lambda z, t: z, lambda z, t: 0.5 * z - t)
    # One level: the whole way is one step of the teacher, and the student is not asked.
    taught = objective(
        teacher, "distill.levels=1", guidance_scale=3.0, guidance_from=0.4, guidance_to=0.8
    )
    flow = batch(torch.tensor([0.2, 0.4, 0.6, 0.8, 0.9], dtype=torch.float64))
    path = taught.towards(one_point(float("nan")), flow)
    t = flow.t_B.view(-1, 1, 1, 1, 1)
    z = (1 - t) * flow.x + t * flow.noise
    inside = torch.tensor([0, 1, 1, 1, 0]).view(-1, 1, 1, 1, 1) > 0
    expected = torch.where(inside, guide(z, 0.5 * z - t, 3.0), z)
    torch.testing.assert_close(path.noise - path.x, expected)


def test_the_target_follows_no_gradient():
    factor = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    student = Flow(lambda z, t: factor * z)
    path = objective(one_point(1.0)).towards(student, batch(torch.tensor([1.0, 0.3])))
    assert not path.x.requires_grad and not path.noise.requires_grad
    assert path.losses(student).requires_grad


def test_condition_frames_stay_what_they_are_and_count_for_nothing():
    flow = batch(torch.tensor([0.7, 0.3], dtype=torch.float64), mask_T=(1, 0, 1))
    path = objective(one_point(1.0)).towards(one_point(1.0), flow)
    assert torch.equal(path.x[:, :, [0, 2]], flow.x[:, :, [0, 2]])
    assert torch.equal(path.noise[:, :, [0, 2]], flow.noise[:, :, [0, 2]])
    assert torch.equal(path.mask_BT, flow.mask_BT)
    assert float((path.x[:, :, 1] - 1.0).abs().max()) < 1e-6


@settings(deadline=None, max_examples=8)
@given(steps=st.sampled_from([1, 4, 5]), times=st.integers(1, 3), shift=st.sampled_from([1.0, 3.0]))
def test_all_levels_that_samples_are_made_at_are_trained_and_no_others_drawn(steps, times, shift):
    taught = objective(
        one_point(0.0),
        f"distill.levels={steps * times}",
        f"objective.num_steps={steps}",
        f"objective.shift={shift}",
    )
    levels = taught.levels(SIZE)
    asked = taught.spec.sampling_times(SIZE)[:-1].float()
    assert set(asked.tolist()) <= set(levels.tolist())
    entry = MicroBatch(0, Bucket(5, 16, 32), 0, tuple(range(9)), (0,) * 9)
    clips = [Clip(row, 0, None, None, 8.0, "said", "") for row in range(9)]
    drawn = taught.draws(ClipBatch(entry, clips, [], 9.0)).t_B
    size = taught.latent_size(ClipBatch(entry, clips, [], 9.0))
    assert set(drawn.tolist()) <= set(taught.levels(size).tolist())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.guidance_scale=2", "set objective.guidance_scale=1"),
        ("objective.condition_scale=2", "set objective.condition_scale=1"),
        ("task=vae", "leave it out"),
        ("adapter.rank=4", "set adapter.rank=0"),
    ],
)
def test_what_cannot_be_distilled_is_said_with_the_key(override, said):
    asked = ["experiment=parity_tiny", "distill.teacher=runs/a", "objective.guidance_scale=1"]
    with pytest.raises(ConfigError, match=r"distill\.teacher=runs/a.*") as told:
        compose([*asked, "init.run=runs/a", override])
    assert said in str(told.value)
