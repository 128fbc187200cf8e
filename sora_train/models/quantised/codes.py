"""Weights as codes and scales: int8 and e4m3 with one scale an output channel, nf4 with one for each 64 values.

Both are uint8, scales as the bytes of float32: FSDP2 casts what is floating to its compute dtype and gathers all
else as it is. Rows stay rows, so a part of the rows is quantised as it would be within the whole.

Dimension key: O output channels, I input channels, G scales of a row.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

KINDS = ("fp8", "int8", "nf4")
GROUP = 64
"""Values of nf4 that share a scale."""
E4M3_MAX = 448.0
INT8_MAX = 127.5
"""The largest of a row is half a step beyond the last code, so that both ends err alike."""
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NormalFloat4 (Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""


def row_bytes(kind: str, inputs: int) -> tuple[int, int]:
    """(bytes of codes, bytes of scales) of one output channel with so many inputs."""
    if kind == "nf4":
        return inputs // 2, 4 * (inputs // GROUP)
    return inputs, 4


def quantise(weight_OI: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes (O, bytes) and scales (O, 4 G), both uint8, of a matrix; see `row_bytes`."""
    weight = weight_OI.detach().float()
    if kind == "nf4":
        groups = weight.unflatten(1, (-1, GROUP))
        scales = _not_zero(groups.abs().amax(2))
        codes = _nearest(groups / scales.unsqueeze(2)).flatten(1)
        return codes[:, ::2] << 4 | codes[:, 1::2], _as_bytes(scales)
    largest = weight.abs().amax(1, keepdim=True)
    if kind == "int8":
        scales = _not_zero(largest / INT8_MAX)
        codes = (weight * (1.0 / scales)).round_().clamp_(-128, 127).to(torch.int8)
    else:
        scales = _not_zero(largest / E4M3_MAX)
        codes = (weight / scales).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), _as_bytes(scales)


def dequantise(codes: Tensor, scales: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The matrix (O, I) in `dtype`: a code's value times its scale, rounded once (nf4 in bfloat16: its 16 values are
    rounded too)."""
    factors = scales.view(torch.float32)
    if kind == "int8":
        return codes.view(torch.int8).to(dtype).mul_(factors)
    if kind == "fp8":
        return codes.view(torch.float8_e4m3fn).to(dtype).mul_(factors)
    pairs = F.embedding(codes.int(), _pairs_of(dtype, codes.device))
    return pairs.view(len(codes), -1, GROUP).mul_(factors.unsqueeze(2)).view(len(codes), -1)


def _not_zero(scales: Tensor) -> Tensor:
    """Scales by which a row of zeros can be divided too."""
    return torch.where(scales == 0, 1.0, scales)


def _as_bytes(scales: Tensor) -> Tensor:
    return scales.contiguous().view(torch.uint8)


def _nearest(values: Tensor) -> Tensor:
    """Numbers of the nearest of NF4; halfway between two the lower one."""
    levels = torch.tensor(NF4, device=values.device)
    middles = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(values.contiguous(), middles, out_int32=True).to(torch.uint8)


@functools.cache
def _pairs_of(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 2): the two values that a byte of nf4 stands for, the high half first."""
    # Made on real memory, even where sizes alone are counted.
    with _disable_current_modes(), torch.inference_mode(False):
        levels = torch.tensor(NF4, dtype=dtype, device=device)
        return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
