"""Rotary positions over latent frames, rows and columns (Su et al. 2021, arXiv:2104.09864),
factorised as in Wan.

A head's width K is split over the three axes; each pair of neighbouring channels is turned by an
angle that grows with the token's place on its axis. Plain functions of the grid: any size works and
nothing is stored with the weights.

Dimension key: B batch, T latent frames, P tokens of a frame (rows * columns), N heads, K head
width, J = K / 2 pairs.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor

from sora_train.errors import UserError

THETA = 10000.0


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head for frames, rows and columns: rows and columns an even third each,
    frames the rest."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def check_positions(grid: tuple[int, int, int], longest: int) -> None:
    """Raises UserError if an axis of the token grid (frames, rows, columns) is longer than `longest`.

    Any length could be computed here; open Wan weights and what loads them hold a table of 1024.
    """
    for count, axis in zip(
        grid, ("latent frames", "rows of tokens", "columns of tokens"), strict=True
    ):
        if count > longest:
            raise UserError(
                f"a clip of {count} {axis} is longer than model.rope_max_length={longest}; use shorter or smaller "
                "clips, or raise it for a model of your own"
            )


def axis_angles(length: int, width: int, device: torch.device) -> Tensor:
    """Angles in radians, (length, width / 2), in float64: at thousands of frames float32 would lose
    digits."""
    frequencies = THETA ** -(
        torch.arange(0, width, 2, dtype=torch.float64, device=device) / max(width, 1)
    )
    return torch.outer(torch.arange(length, dtype=torch.float64, device=device), frequencies)


def rope_table(
    grid: tuple[int, int, int], head_dim: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """cos and sin of every token's angles, stacked on the first dimension.

    Args:
        grid: tokens along frames, rows and columns.
        head_dim: K, even.
        dtype: float32, or float64 in tests.

    Returns:
        (2, T, P, 1, J), ready to be multiplied with queries (B, T, P, N, J). It is computed once a
        forward in a few small kernels: a cache would have to keep fake, inference and compiled
        tensors apart.
    """
    num_frames, num_rows, num_columns = grid
    frame_dim, row_dim, column_dim = split_head_dim(head_dim)
    angles = torch.cat(
        [
            repeat(
                axis_angles(num_frames, frame_dim, device),
                "t j -> t h w j",
                h=num_rows,
                w=num_columns,
            ),
            repeat(
                axis_angles(num_rows, row_dim, device),
                "h j -> t h w j",
                t=num_frames,
                w=num_columns,
            ),
            repeat(
                axis_angles(num_columns, column_dim, device),
                "w j -> t h w j",
                t=num_frames,
                h=num_rows,
            ),
        ],
        dim=-1,
    )
    angles = rearrange(angles, "t h w j -> t (h w) 1 j")
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def apply_rope(x_BTPNK: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of channels (2j, 2j + 1) by its token's angle j; shape and dtype stay."""
    cos, sin = table.to(x_BTPNK.dtype).unbind(0)
    pairs = x_BTPNK.unflatten(-1, (-1, 2))
    if x_BTPNK.device.type == "cpu" and not torch.compiler.is_compiling():
        # One pass instead of seven, five times as fast; compilers fuse the real form and not this
        # one.
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(
            -2
        )
    return _rotate(pairs, cos, sin).flatten(-2)


def _rotate(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = pairs.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
