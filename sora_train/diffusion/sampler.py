"""From noise to data: the flow's ODE dz/dt = v(z, t), integrated from t = 1 to t = 0.

Every setting comes from the DiffusionSpec, the same object the loss used.

Dimension key: B batch, T latent frames; z has shape (B, C, T, H, W).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sora_train.diffusion.condition_masks import frame_times
from sora_train.diffusion.flow import interpolate, velocity_target
from sora_train.diffusion.spec import DiffusionSpec
from sora_train.diffusion.timesteps import shown_time
from sora_train.diffusion.unipc import UniPC

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(z, t_BT), of the shape of z."""

Slope = Callable[[Tensor, float], Tensor]
"""v(z, t) with condition frames held in place."""


@torch.no_grad()
def sample_ode(
    velocity: Velocity,
    noise: Tensor,
    spec: DiffusionSpec,
    *,
    condition_latents: Tensor | None = None,
    mask_BT: Tensor | None = None,
    strength_T: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrate from noise to data with the spec's solver, steps and shift.

    Args:
        velocity: the model, guidance included.
        noise: z at t = 1, (B, C, T, H, W), float32 or float64.
        condition_latents: clean latents, (B, C, T, H, W), of the frames in `mask_BT` and `strength_T`.
        mask_BT: 1 for condition frames; they keep their values and are shown to the model at t = 0.
        strength_T: noise level in [0, 1] from which each latent frame is made anew (SDEdit, Meng et
            al. 2021, arXiv:2108.01073): down to it the frame stays on the straight path from
            `condition_latents` to its noise. 1 makes a frame from noise alone, 0 keeps it. The grid begins at
            the highest level; a frame with a lower one is let go at the first step at or below it.
        on_step: called with the number of steps done, after each.

    Returns:
        Latents (B, C, T, H, W) at t = 0.

    Raises:
        ValueError: condition latents without a mask or strength, or one of these without latents.
    """
    if (condition_latents is None) != (mask_BT is None and strength_T is None):
        raise ValueError(
            "condition latents and their mask or strength belong together; one of them is missing"
        )
    batch, _, num_frames = noise.shape[:3]
    mask_BT = noise.new_zeros(batch, num_frames) if mask_BT is None else mask_BT
    strength_T = noise.new_ones(num_frames) if strength_T is None else strength_T.to(noise)
    source = noise if condition_latents is None else condition_latents.to(noise)
    free = (mask_BT == 0)[:, None, :, None, None]
    times = grid_from(spec.sampling_times(noise.shape[2:]).tolist(), float(strength_T.max()))
    start_B = noise.new_full((batch,), times[0])
    edited = (strength_T < 1)[:, None, None]
    z = torch.where(edited, interpolate(source, noise, start_B), noise)
    z = torch.where(free, z, source)

    def slope(z: Tensor, t: float) -> Tensor:
        shown_B = z.new_full((batch,), shown_time(t, spec.time_rounding))
        v = velocity(z, frame_times(shown_B, mask_BT)).to(z.dtype)
        held = (strength_T < t)[:, None, None]
        v = torch.where(held, velocity_target(source, noise), v)
        return torch.where(free, v, torch.zeros_like(v))

    for done, stepped in enumerate(_steps(spec.solver, slope, z, times), start=1):
        z = stepped
        if on_step is not None:
            on_step(done)
    # Kept frames come back to the last digit, whatever the steps have rounded.
    kept = (strength_T == 0)[:, None, None] | ~free
    return torch.where(kept, source, z)


def grid_from(times: Sequence[float], start: float) -> list[float]:
    """The part of a grid that lies below `start`, led in by `start` itself; the whole grid from 1."""
    return list(times) if start >= 1 else [start, *(t for t in times if t < start)]


def _steps(solver: str, slope: Slope, z: Tensor, times: list[float]) -> Iterator[Tensor]:
    """z after each step down the times."""
    unipc = UniPC(times)
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        match solver:
            case "euler":
                z = _euler(slope, z, t, t_next)
            case "heun":
                z = _heun(slope, z, t, t_next)
            case _:
                z = unipc.step(i, z, z - t * slope(z, t))
        yield z


def _euler(slope: Slope, z: Tensor, t: float, t_next: float) -> Tensor:
    """First order, one call of the model."""
    return z + (t_next - t) * slope(z, t)


def _heun(slope: Slope, z: Tensor, t: float, t_next: float) -> Tensor:
    """Second order, two calls of the model (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""
    v = slope(z, t)
    v_next = slope(z + (t_next - t) * v, t_next)
    return z + (t_next - t) * 0.5 * (v + v_next)
