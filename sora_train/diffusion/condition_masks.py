"""Which latent frames of a clip are conditions, and what that does to their noise level.

One generator of masks for training and sampling alike. A condition frame enters the model clean, with
its own noise level `t_cond` (0, or a little noise), and is left out of the loss. So one model learns
to make a clip from text alone, from images, and from pieces of clips; docs/objective.md draws every
kind. `condition_frames` encodes such frames.

Dimension key: B batch, T latent frames. A mask is 1 where a frame is a condition.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sora_train.base.seeding import key_seed

KINDS = (
    "t2v",
    "i2v",
    "i2v_last",
    "i2v_both",
    "extend",
    "extend_back",
    "infill",
    "connect",
    "loop",
    "every_nth",
    "random",
)
"""Every kind of conditioning, by the name that configs and specs use."""

STILL_KINDS = ("i2v", "i2v_last", "i2v_both", "loop")
"""Kinds given as single images: of a latent frame only its last pixel frame is known."""

HEAD_KINDS = ("t2v", "i2v", "extend")
"""Kinds that give nothing but the beginning of a clip, whose latents depend on no later frame if the VAE is causal."""


def choose_kind(probabilities: Sequence[tuple[str, float]], u: float) -> str:
    """The kind on which a uniform draw u in [0, 1) falls; probabilities sum to 1."""
    reached = 0.0
    for kind, probability in probabilities:
        reached += probability
        if u < reached:
            return kind
    # Rounding may leave the sum a hair under 1: the last kind that can happen takes the rest.
    return [kind for kind, probability in probabilities if probability > 0][-1]


def kind_for(kind: str, num_frames: int) -> str:
    """The kind that a clip of `num_frames` latent frames can take, since one must stay free.

    An image is always `t2v`. Two latent frames have no two ends and something between them, so the
    kinds that need these become `i2v`.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"conditioning kind '{kind}' is unknown; choose among {', '.join(KINDS)}")
    if num_frames == 1:
        return "t2v"
    if num_frames == 2 and kind in ("i2v_both", "infill", "connect", "loop", "every_nth"):
        return "i2v"
    return kind


def ends_mask(num_frames: int, head: int, tail: int = 0) -> Tensor:
    """Mask (T,) float32 of the first `head` and the last `tail` latent frames.

    Raises:
        ValueError: a negative number, or no frame left free.
    """
    if min(head, tail) < 0 or head + tail >= num_frames:
        raise ValueError(
            f"{head} latent frames given at the head and {tail} at the tail leave none of "
            f"{num_frames} free; give fewer, or make a longer clip"
        )
    frames = torch.arange(num_frames)
    return ((frames < head) | (frames >= num_frames - tail)).float()


def frame_mask(kind: str, num_frames: int, u: float) -> Tensor:
    """Mask (T,) float32 of one clip of a kind, as training draws it; at least one frame stays free.

    Args:
        kind: one of KINDS.
        num_frames: T. A single frame (an image) is never a condition: nothing would be left to learn.
        u: uniform draw in [0, 1), which decides all that a kind leaves open: how many frames, and
            which.

    Raises:
        ValueError: unknown kind.
    """
    last = num_frames - 1
    match kind_for(kind, num_frames):
        case "t2v":
            return ends_mask(num_frames, 0)
        case "i2v":
            return ends_mask(num_frames, 1)
        case "i2v_last":
            return ends_mask(num_frames, 0, 1)
        case "i2v_both" | "loop":
            return ends_mask(num_frames, 1, 1)
        case "extend":
            return ends_mask(num_frames, 1 + int(u * last))
        case "extend_back":
            return ends_mask(num_frames, 0, 1 + int(u * last))
        case "infill":
            return _gap(num_frames, u)
        case "connect":
            k = 1 + int(u * (last // 2))
            return ends_mask(num_frames, k, k)
        case "every_nth":
            n = 2 + int(u * (num_frames - 2))
            return (torch.arange(num_frames) % n == 0).float()
        case _:
            return _random(num_frames, u)


def _gap(num_frames: int, u: float) -> Tensor:
    """A gap of any length anywhere between the two ends, every one as likely as every other."""
    gaps = [
        (head, num_frames - end)
        for head in range(1, num_frames - 1)
        for end in range(head + 1, num_frames)
    ]
    return ends_mask(num_frames, *gaps[int(u * len(gaps))])


def _random(num_frames: int, u: float) -> Tensor:
    """1 <= k < T frames, wherever they lie."""
    # A single u has not digits enough for the subsets of a long clip, so it seeds what draws them.
    generator = np.random.Generator(np.random.PCG64(key_seed(0, "random frames", repr(u))))
    mask = torch.zeros(num_frames)
    mask[generator.permutation(num_frames)[: generator.integers(1, num_frames)]] = 1.0
    return mask


def frame_times(t: Tensor, mask_BT: Tensor, t_cond: float | Tensor = 0.0) -> Tensor:
    """Noise level of each latent frame, (B, T): `t_cond` where the frame is a condition, the clip's t
    elsewhere.

    Args:
        t: one level a clip (B,), or one a latent frame (B, T).
        t_cond: one level for all clips, or one a clip (B,).
    """
    t_cond_B = torch.as_tensor(t_cond, dtype=t.dtype, device=t.device).expand(len(t))
    return torch.where(mask_BT > 0, t_cond_B[:, None], t if t.ndim == 2 else t[:, None])


def condition_times(u_share_B: Tensor, u_level_B: Tensor, share: float, top: float) -> Tensor:
    """Noise levels (B,) of condition frames: 0, and for a `share` of the clips uniform in [0, top).

    A little noise on them closes the gap between true frames in training and generated
    ones in a continuation (Cosmos-Predict1, arXiv:2501.03575, section 5; SkyReels-V2,
    arXiv:2504.13074, takes 0.02 at sampling).

    Args:
        u_share_B: uniform draws that pick the clips.
        u_level_B: uniform draws that become their levels.
    """
    return torch.where(u_share_B < share, u_level_B * top, torch.zeros_like(u_level_B))
