"""AdamW whose moments take a byte each: codes, and a scale for every 256 values of a row.

Dettmers et al. 2022, arXiv:2110.02861: a block of values is divided by the largest of them and each is rounded to one
of 256 numbers. `int8` takes the paper's dynamic numbers, as torchao and bitsandbytes do, `fp8` takes float8 (e4m3),
which is coarser for small values. Blocks here are parts of a row, never of two, so a rank that holds rows holds whole
blocks, and codes and scales are the same under every layout; torchao's own optimizers cut blocks from whatever a rank
holds.

A second moment that is above 0 is never rounded to 0, where only epsilon would be left to divide by. Biases, norms and
matrices of fewer than 4,096 values keep their moments in float32: they are few, and take part in every output. In an
adapter nearly everything is that small, so this is for full fine-tunes.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sora_train.config import OptimConfig
from sora_train.parallel.memory.moments import adam_moments, moments_of
from sora_train.training.optim.judged import Judged

BLOCK = 256
SMALLEST = 4096
"""Values of a matrix whose moments are coded."""
FLOAT8 = torch.float8_e4m3fn
TINY = 1e-30


def dynamic_numbers(signed: bool) -> list[float]:
    """The 256 numbers of the paper's dynamic tree: 0, 1, and for each power of ten evenly spaced ones, twice as many as
    for the power below it."""
    numbers = [0.0, 1.0]
    for power in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (power if signed else power + 1) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (power - 6)
        numbers += [*middles, *(-middles if signed else [])]
    return sorted(map(float, numbers))


class Code:
    """A byte's 256 numbers, from -1 or 0 to 1, on a device."""

    def __init__(self, kind: str, signed: bool, device: torch.device):
        self.signed = signed
        if kind == "fp8":
            codes = torch.arange(256, dtype=torch.uint8, device=device)
            self.numbers = codes.view(FLOAT8).float() / torch.finfo(FLOAT8).max
            self.middles = None
            return
        numbers = torch.tensor(dynamic_numbers(signed), dtype=torch.float32)
        self.numbers = numbers.to(device)
        self.middles = (self.numbers[1:] + self.numbers[:-1]) / 2

    def encode(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, ...) -> codes of the same shape, uint8, and scales (rows, blocks of a row)."""
        blocks = in_blocks(values)
        scales = blocks.abs().amax(-1).clamp(min=TINY)
        unit = blocks / scales[..., None]
        if self.middles is None:
            codes = (unit * torch.finfo(FLOAT8).max).to(FLOAT8).view(torch.uint8)
        else:
            codes = torch.bucketize(unit, self.middles, out_int32=True, right=True).to(torch.uint8)
        if not self.signed:
            codes = torch.where((unit > 0) & (codes == 0), 1, codes)
        return out_of_blocks(codes, values), scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The values, in the scales' precision."""
        numbers = self.numbers.to(scales.dtype)[in_blocks(codes).int()]
        return out_of_blocks(numbers.mul_(scales[..., None]), codes)


def in_blocks(values: Tensor) -> Tensor:
    """(rows, ...) -> (rows, blocks, 256), filled up with zeros."""
    width = values.shape[1:].numel()
    filled = nn.functional.pad(values.reshape(len(values), width), (0, -width % BLOCK))
    return filled.view(len(values), -(-width // BLOCK), BLOCK)


def out_of_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """The inverse of `in_blocks`, for a tensor of this shape; without the memory of what was filled up."""
    return blocks.flatten(1)[:, : like.shape[1:].numel()].contiguous().view(like.shape)


class EightBitAdamW(Judged):
    """Loshchilov & Hutter 2019, arXiv:1711.05101, on moments that are decoded and encoded, one weight at a time."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        placed: Mapping[nn.Parameter, Tensor],
        cfg: OptimConfig,
    ):
        """`placed` says how each parameter lies; the sizes of the whole weights decide which moments are coded."""
        super().__init__(groups, {"lr": cfg.lr, "betas": tuple(cfg.betas), "eps": cfg.eps})
        self.coded = {
            p for p, whole in placed.items() if whole.ndim > 1 and whole.numel() >= SMALLEST
        }
        device = next(iter(placed)).device
        self.codes = {
            "exp_avg": Code(cfg.state, signed=True, device=device),
            "exp_avg_sq": Code(cfg.state, signed=False, device=device),
        }

    def initial_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = adam_moments(parameter)
        if parameter in self.coded:
            for name, code in self.codes.items():
                state[name], state[f"{name}_scale"] = code.encode(state[name])
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        (beta1, beta2), state = group["betas"], moments_of(self, weight)
        grad, taken = self.gradient(weight), self.taken()
        state["step"] += taken
        # A first step that is not taken leaves the count at 0.
        number = state["step"].double().clamp(min=1.0)
        rate = group["lr"] * taken
        mean, square = (self._read(weight, name) for name in self.codes)
        mean.add_((grad - mean) * ((1.0 - beta1) * taken))
        square.add_((grad.square() - square) * ((1.0 - beta2) * taken))
        weight.mul_(1.0 - rate * group["weight_decay"])
        scale = square.div(1.0 - beta2**number).sqrt_().add_(group["eps"])
        weight.sub_(mean.div(1.0 - beta1**number).div_(scale) * rate)
        self._write(weight, "exp_avg", mean)
        self._write(weight, "exp_avg_sq", square)

    def _read(self, weight: nn.Parameter, name: str) -> Tensor:
        state = self.state[weight]
        if weight not in self.coded:
            return state[name]
        return self.codes[name].decode(state[name], state[f"{name}_scale"])

    def _write(self, weight: nn.Parameter, name: str, values: Tensor) -> None:
        """Nothing where the moments are the state itself, nor in a step that is not taken: encoding is no identity."""
        if weight not in self.coded:
            return
        for key, new in zip((name, f"{name}_scale"), self.codes[name].encode(values), strict=True):
            old = self.state[weight][key]
            old.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, old, new))
