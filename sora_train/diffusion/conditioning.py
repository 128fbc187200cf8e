"""Which latent frames of a clip are given, and what that does to their noise level.

A given frame enters the model clean, with its own noise level `t_cond` (0, or a little noise), and
is left out of the loss. One model so learns text-to-video, image-to-video and extension.

Dimension key: B batch, T latent frames. A mask is 1 where a frame is given.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

KINDS = ("t2v", "i2v", "extend")


def choose_kind(probabilities: Sequence[tuple[str, float]], u: float) -> str:
    """The kind on which a uniform draw u in [0, 1) falls; probabilities sum to 1."""
    reached = 0.0
    for kind, probability in probabilities:
        reached += probability
        if u < reached:
            return kind
    # Rounding may leave the sum a hair under 1: the last kind that can happen takes the rest.
    return [kind for kind, probability in probabilities if probability > 0][-1]


def frame_mask(kind: str, num_frames: int, u: float) -> Tensor:
    """Mask (T,) float32 of one clip.

    Args:
        kind: `t2v` gives nothing, `i2v` the first latent frame, `extend` the first k of them.
        num_frames: T. A single frame (an image) is never given: nothing would be left to learn.
        u: uniform draw in [0, 1) that decides k, 1 <= k < T.

    Raises:
        ValueError: unknown kind.
    """
    given = {"t2v": 0, "i2v": 1, "extend": 1 + int(u * (num_frames - 1))}
    if kind not in given:
        raise ValueError(f"conditioning kind '{kind}' is unknown; choose among {', '.join(KINDS)}")
    count = min(given[kind], num_frames - 1)
    return (torch.arange(num_frames) < count).float()


def frame_times(t_B: Tensor, mask_BT: Tensor, t_cond: float = 0.0) -> Tensor:
    """Noise level of each latent frame, (B, T): `t_cond` where the frame is given, the clip's t
    elsewhere."""
    return torch.where(mask_BT > 0, torch.full_like(t_B, t_cond)[:, None], t_B[:, None])
