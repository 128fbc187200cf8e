"""Rectified flow: straight paths from data to noise (Liu et al. 2022, arXiv:2209.03003).

The convention everywhere in sora_train: t = 0 is data, t = 1 is noise, z_t = (1 - t) * x + t *
noise, and the model predicts the velocity v = dz/dt = noise - x.

Dimension key: B batch, T latent frames; x, noise, z and v have shape (B, C, T, H, W).
"""

import torch
from torch import Tensor


def expand_times(t: Tensor, num_dims: int = 5) -> Tensor:
    """Times (B,) or (B, T) so that they broadcast over (B, C, T, H, W)."""
    if t.ndim == 1:
        return t.view(-1, *[1] * (num_dims - 1))
    return t[:, None, :, None, None]


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 - t) * x + t * noise, t of shape (B,) or (B, T); exact at both ends
    (arXiv:2209.03003, eq. 1)."""
    t = expand_times(t, x.ndim).to(x.dtype)
    return (1 - t) * x + t * noise


def velocity_target(x: Tensor, noise: Tensor) -> Tensor:
    """v = noise - x, the same at every t of the path."""
    return noise - x


def sample_losses(
    v_pred: Tensor,
    x: Tensor,
    noise: Tensor,
    frame_weight_BT: Tensor | None = None,
    factor_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Squared velocity error of each sample, averaged over what counts, in at least float32.

    Args:
        frame_weight_BT: weight of each latent frame; 0 leaves a frame (a condition) out, whatever its
            values are. None counts all alike.
        factor_BT: on each frame's error; no part of the weights.

    Returns:
        (losses, weights), both (B,): weight 1, or 0 for a sample of which no frame counts (its loss
        is then 0).
    """
    error_BT, weight_BT = _frame_errors(v_pred, x, noise, frame_weight_BT)
    if factor_BT is not None:
        error_BT = error_BT * _where_counted(weight_BT, factor_BT)
    total_B = weight_BT.sum(dim=1)
    losses = (error_BT * weight_BT).sum(dim=1) / total_B.clamp_min(torch.finfo(total_B.dtype).tiny)
    return losses, (total_B > 0).to(total_B)


def velocity_losses(
    v_pred: Tensor,
    x: Tensor,
    noise: Tensor,
    frame_weight_BT: Tensor | None = None,
    sample_weight_B: Tensor | None = None,
    time_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each sample's loss and its weight, both (B,), so that micro-batches and ranks add up.

    Args:
        sample_weight_B: 0 for a sample that failed to load (whatever its values are), else 1.
        time_weight: factor on each loss (B,), or on each latent frame's (B, T), by its noise level; it is no part
            of the weight.
    """
    if sample_weight_B is not None:
        weight_BT = (
            v_pred.new_ones(len(x), x.shape[2]) if frame_weight_BT is None else frame_weight_BT
        )
        frame_weight_BT = weight_BT * (sample_weight_B > 0)[:, None].to(weight_BT)
    factor_BT = time_weight if time_weight is not None and time_weight.ndim == 2 else None
    losses_B, weights_B = sample_losses(v_pred, x, noise, frame_weight_BT, factor_BT)
    if sample_weight_B is not None:
        weights_B = weights_B * sample_weight_B.to(weights_B)
    if time_weight is not None and factor_BT is None:
        losses_B = losses_B * _where_counted(weights_B, time_weight)
    return losses_B * weights_B, weights_B


def frame_losses(
    v_pred: Tensor,
    x: Tensor,
    noise: Tensor,
    frame_weight_BT: Tensor,
    time_weight: Tensor | None = None,
) -> Tensor:
    """Mean squared velocity error of each latent frame that counts, else 0, (B, T).

    All tokens of a frame hold as many values, so this is also the mean over its tokens.

    Args:
        frame_weight_BT: 1 for latent frames that count, 0 for those left out (condition frames).
        time_weight: factor on each clip's losses (B,), or on each frame's (B, T), by its noise level.
    """
    error_BT, weight_BT = _frame_errors(v_pred, x, noise, frame_weight_BT)
    if time_weight is not None:
        counted = weight_BT if time_weight.ndim == 2 else weight_BT.amax(dim=1, keepdim=True)
        factor = time_weight if time_weight.ndim == 2 else time_weight[:, None]
        error_BT = error_BT * _where_counted(counted, factor)
    return error_BT * weight_BT


def _frame_errors(
    v_pred: Tensor, x: Tensor, noise: Tensor, frame_weight_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mean squared velocity error of each latent frame, 0 where it is left out, and the weights, both (B, T)."""
    dtype = torch.promote_types(v_pred.dtype, torch.float32)
    error = v_pred.to(dtype) - velocity_target(x.to(dtype), noise.to(dtype))
    if frame_weight_BT is None:
        return error.square().mean(dim=(1, 3, 4)), error.new_ones(len(x), x.shape[2])
    weight_BT = frame_weight_BT.to(dtype)
    # Chosen before the square and not multiplied: what is left out may hold anything, 0 * NaN is NaN, and so is the
    # gradient of a square at NaN, whatever is multiplied behind it.
    counted = (weight_BT > 0)[:, None, :, None, None]
    return torch.where(counted, error, 0.0).square().mean(dim=(1, 3, 4)), weight_BT


def _where_counted(weight: Tensor, factor: Tensor) -> Tensor:
    """The factors of clips or frames that count, 0 for the others: of these a factor may be infinite."""
    return torch.where(weight > 0, factor.to(weight), 0.0)
