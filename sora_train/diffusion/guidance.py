"""Guidance: how the velocities with and without caption and condition frames become one.

Dimension key: B batch, T latent frames; v has shape (B, C, T, H, W).
"""

import torch
from torch import Tensor


def guide(v: Tensor, v_null: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6): 1 is no guidance."""
    return v_null + guidance_scale * (v - v_null)


def guide_both(
    v: Tensor, v_condition: Tensor, v_null: Tensor, guidance_scale: float, condition_scale: float
) -> Tensor:
    """Guidance by condition frames, and by the caption on top of them (Brooks et al. 2023,
    arXiv:2211.09800, eq. 3); with condition_scale = 1 it is `guide(v, v_condition)`.

    Args:
        v: with caption and condition frames.
        v_condition: with condition frames alone.
        v_null: with neither.
    """
    return v_null + condition_scale * (v_condition - v_null) + guidance_scale * (v - v_condition)


def rescale(v_guided: Tensor, v: Tensor, share: float, free_BT: Tensor) -> Tensor:
    """Guidance increases the spread of the velocity; `share` of the increase is taken back (Lin et al. 2024,
    arXiv:2305.08891, eq. 15 and 16).

    Args:
        v_guided: after guidance.
        v: with caption and condition frames, without guidance.
        share: phi; 0 changes nothing, 1 gives each clip the spread of `v`.
        free_BT: 1 for latent frames that are made; condition frames have no velocity.
    """
    factor_B = _spread(v, free_BT) / _spread(v_guided, free_BT).clamp_min(1e-12)
    return v_guided * (1 + share * (factor_B - 1)).view(-1, 1, 1, 1, 1)


def _spread(v: Tensor, free_BT: Tensor) -> Tensor:
    """Standard deviation of each clip's values on its free frames, (B,)."""
    weight = free_BT.to(v)[:, None, :, None, None].expand_as(v)
    count_B = weight.sum(dim=(1, 2, 3, 4)).clamp_min(1)
    mean_B = (v * weight).sum(dim=(1, 2, 3, 4)) / count_B
    centred = (v - mean_B.view(-1, 1, 1, 1, 1)) * weight
    return torch.sqrt(centred.square().sum(dim=(1, 2, 3, 4)) / count_B)
