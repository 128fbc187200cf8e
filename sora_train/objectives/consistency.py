"""Consistency distillation: a guided flow learns to reach its own end in a few steps, without guidance.

A consistency function f maps every point z_t of a trajectory of the flow's ODE to the trajectory's end at t = 0
(Song et al. 2023, arXiv:2303.01469). Written through the velocity u that the model predicts,

    f(z, t) = z - t * u(z, t),

it is the identity at t = 0 whatever the model says (their eq. 5 with c_skip = 1 and c_out = -t), u is the mean velocity
from t down to 0, and what a sampler does with it is what it does with any velocity.

Distillation (their algorithm 2, with guidance inside the step of the ODE as in Luo et al. 2023, arXiv:2310.04378, eq.
14): the teacher's guided velocity v takes one Euler step from t to the next level s of a coarse grid, and both ends of
the step must have one end, f(z_t, t) = f(z_s, s). Solved for u this is

    t * u(z_t, t) = (t - s) * v(z_t, t) + s * u(z_s, s),

a regression of velocities as in any training of a flow: only that its targets are these. The right side is computed by
the student as it is, without gradient: an average of it as a target only slows training down (Song & Dhariwal 2023,
arXiv:2310.14189, section 3.2), and it would be a further state to save.

Dimension key: B batch, C latent channels, T latent frames.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sora_train.config import Config
from sora_train.diffusion.condition_masks import frame_times
from sora_train.diffusion.flow import expand_times, interpolate
from sora_train.diffusion.guidance import guide, rescale
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.models.vae.autoencoder import VideoVAE
from sora_train.models.work_sharing import NO_SHARING, WorkSharing
from sora_train.objectives.flow_batch import FlowBatch
from sora_train.objectives.sample_draws import SampleDraws
from sora_train.objectives.text_to_video import TextToVideoObjective


@dataclass(frozen=True)
class Teacher:
    """A trained flow as it is sampled: its weights, frozen, and the guidance of its spec."""

    model: nn.Module
    spec: DiffusionSpec
    digest: str
    """Of its weights."""

    @torch.no_grad()
    def velocity(self, flow: FlowBatch) -> Tensor:
        """The guided velocity (B, C, T, H, W) of a batch; clips outside the guidance interval have that of the
        caption alone."""
        spec = self.spec
        t_B = flow.t_B.to(torch.float64)
        guided_B = (spec.guidance_from <= t_B) & (t_B <= spec.guidance_to)
        v = flow.predict(self.model)
        if spec.guidance_scale == 1 or not bool(guided_B.any()):
            return v
        v_null = replace(flow, prompts=[""] * len(flow.prompts), text=()).predict(self.model)
        v_guided = guide(v, v_null, spec.guidance_scale)
        if spec.guidance_rescale:
            v_guided = rescale(v_guided, v, spec.guidance_rescale, flow.counted_BT)
        return torch.where(expand_times(guided_B), v_guided, v)


class ConsistencyObjective(TextToVideoObjective):
    """The student's velocity is the mean of the teacher's guided one from each level of a grid down to 0."""

    def __init__(
        self,
        cfg: Config,
        spec: DiffusionSpec,
        vae: VideoVAE,
        device: torch.device,
        sharing: WorkSharing = NO_SHARING,
        *,
        teacher: Teacher,
    ):
        super().__init__(cfg, spec, vae, device, sharing)
        self.teacher = teacher

    def draws(self, batch: Any) -> SampleDraws:
        """Noise levels are those of the grid, each drawn one moved up to the next: samples start from them."""
        drawn = super().draws(batch)
        levels = self.levels(self.latent_size(batch))
        return replace(drawn, t_B=levels[torch.searchsorted(levels, drawn.t_B)])

    def levels(self, latent_size: tuple[int, int, int]) -> Tensor:
        """The levels that are trained, rising from the lowest above 0 to 1, float32."""
        grid = self.spec.replace(num_steps=self.cfg.distill.levels).sampling_times(latent_size)
        return grid[:-1].flip(0).float()

    def towards(self, model: nn.Module, flow: FlowBatch) -> FlowBatch:
        """The batch on the line from z_t to where its trajectory ends."""
        with torch.no_grad():
            levels = self.levels(tuple(flow.x.shape[2:])).to(flow.t_B)
            below = torch.cat([levels.new_zeros(1), levels])
            s_B = below[torch.searchsorted(levels, flow.t_B)]
            v = self.teacher.velocity(flow)
            # At the last step of the ODE nothing is left below, and the student is not asked.
            u = v if not bool(s_B.any()) else line_through(flow, v, s_B).predict(model).to(v)
            share = expand_times(s_B / flow.t_B.clamp_min(torch.finfo(s_B.dtype).tiny))
            mean = torch.where(share > 0, (1 - share) * v + share * u, v)
            return line_through(flow, mean, flow.t_B)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"teacher": self.teacher.digest}


def line_through(flow: FlowBatch, v: Tensor, t_B: Tensor) -> FlowBatch:
    """The straight path through the batch's z with velocity v, at noise levels `t_B` of it; condition frames stay."""
    t_cond_B = 0.0 if flow.t_cond_B is None else flow.t_cond_B
    counted_BT = flow.counted_BT
    z = interpolate(flow.x, flow.noise, frame_times(flow.t_B, 1 - counted_BT, t_cond_B))
    end = z - expand_times(flow.t_B).to(z) * v
    free = (counted_BT > 0)[:, None, :, None, None]
    return replace(
        flow,
        x=torch.where(free, end, flow.x),
        noise=torch.where(free, end + v, flow.noise),
        t_B=t_B,
    )
