"""From noise to data: the flow's ODE dz/dt = v(z, t), integrated from t = 1 to t = 0.

Every setting comes from the DiffusionSpec, the same object the loss used.

Dimension key: B batch, T latent frames; z has shape (B, C, T, H, W).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sora_train.diffusion.conditioning import frame_times
from sora_train.diffusion.spec import DiffusionSpec

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(z, t_BT), of the shape of z."""


def guide(v: Tensor, v_null: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6): 1 is no guidance."""
    return v_null + guidance_scale * (v - v_null)


@torch.no_grad()
def sample_ode(
    velocity: Velocity,
    noise: Tensor,
    spec: DiffusionSpec,
    *,
    given: Tensor | None = None,
    mask_BT: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrate from noise to data with the spec's solver, steps and shift.

    Args:
        velocity: the model, guidance included.
        noise: z at t = 1, (B, C, T, H, W), float32 or float64.
        given: clean latents of the given frames, (B, C, T, H, W); other frames are ignored.
        mask_BT: 1 for given frames; they keep their values and are shown to the model at t = 0.
        on_step: called with the number of steps done, after each.

    Returns:
        Latents (B, C, T, H, W) at t = 0.

    Raises:
        ValueError: only one of `given` and `mask_BT`.
    """
    if (given is None) != (mask_BT is None):
        raise ValueError("given latents and their mask belong together; one of them is missing")
    batch, _, num_frames = noise.shape[:3]
    mask_BT = noise.new_zeros(batch, num_frames) if mask_BT is None else mask_BT
    free = (mask_BT == 0)[:, None, :, None, None]
    z = noise if given is None else torch.where(free, noise, given.to(noise))
    times = spec.sampling_times(noise.shape[2:]).tolist()

    def slope(z: Tensor, t: float) -> Tensor:
        v = velocity(z, frame_times(z.new_full((batch,), t), mask_BT)).to(z.dtype)
        return torch.where(free, v, torch.zeros_like(v))

    advance = {"euler": _euler, "heun": _heun}[spec.solver]
    for done, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True), start=1):
        z = advance(slope, z, t, t_next)
        if on_step is not None:
            on_step(done)
    return z


def _euler(slope: Callable[[Tensor, float], Tensor], z: Tensor, t: float, t_next: float) -> Tensor:
    """First order, one call of the model."""
    return z + (t_next - t) * slope(z, t)


def _heun(slope: Callable[[Tensor, float], Tensor], z: Tensor, t: float, t_next: float) -> Tensor:
    """Second order, two calls of the model (Karras et al. 2022, arXiv:2206.00364, algorithm 1)."""
    v = slope(z, t)
    v_next = slope(z + (t_next - t) * v, t_next)
    return z + (t_next - t) * 0.5 * (v + v_next)
