"""Uneven exchanges between ranks that share a clip's tokens, each with its true adjoint.

All of them are one all-to-all of pieces whose sizes every rank knows, so there is no padding: a rank
may hold more tokens than another, or none. Sums are made here, in the order of the ranks, so a
result is the same on every rank and in every run. Two exchanges stand inside compiled blocks and
are custom operators; a compiler takes each as one step.

Dimension key: M clips (or clips times tensors), T latent frames, P tokens of a frame, L tokens, N
heads, K head width, U ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def exchange(pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], group: Any) -> list[Tensor]:
    """Piece i goes to rank i of the group; returns what each rank sent to this one, in the given shapes."""
    like = pieces[0]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    received = like.new_empty(sum(sizes))
    dist.all_to_all_single(
        received,
        torch.cat([piece.reshape(-1) for piece in pieces]),
        sizes,
        [piece.numel() for piece in pieces],
        group=group,
    )
    parts = received.split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def gather(mine: Tensor, shapes: Sequence[Sequence[int]], group: Any) -> list[Tensor]:
    """What every rank of the group holds, in the given shapes."""
    return exchange([mine] * len(shapes), shapes, group)


class GatherTokens(torch.autograd.Function):
    """(M, T, P of this rank, ...) -> (M, T, P of all, ...) on every rank.

    Each rank goes on with the whole, so each has a gradient for every part: the adjoint sums them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
        ctx.sizes, ctx.group = tuple(sizes), group
        shapes = [(*x.shape[:2], size, *x.shape[3:]) for size in sizes]
        return torch.cat(gather(x, shapes, group), dim=2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        pieces = dy.split(ctx.sizes, dim=2)
        shape = pieces[dist.get_rank(ctx.group)].shape
        found = exchange(pieces, [shape] * len(pieces), ctx.group)
        total = found[0]
        for part in found[1:]:
            total = total + part
        return total, None, None


def gather_tokens(x: Tensor, sizes: Sequence[int], group: Any) -> Tensor:
    """All ranks' tokens, (M, T, P, ...): each rank gives `sizes` of them along P."""
    whole: Tensor = GatherTokens.apply(x, sizes, group)
    return whole


def group_named(name: str) -> Any:
    """The process group of this name: operators take no objects."""
    return dist.distributed_c10d._resolve_process_group(name)


@torch.library.custom_op("sora::tokens_to_heads", mutates_args=())
def tokens_to_heads(x_MLNK: Tensor, lengths: Sequence[int], rank: int, group: str) -> Tensor:
    """From some tokens with all heads to all tokens with some heads: (M, sum(lengths), N / U, K).

    Args:
        x_MLNK: L is `lengths[rank]`; U, the number of ranks, divides N.
        lengths: tokens of each rank of the group, in its order.
    """
    batch, _, heads, width = x_MLNK.shape
    share = heads // len(lengths)
    shapes = [(batch, length, share, width) for length in lengths]
    found = exchange(x_MLNK.split(share, dim=2), shapes, group_named(group))
    return torch.cat(found, dim=1)


@torch.library.custom_op("sora::heads_to_tokens", mutates_args=())
def heads_to_tokens(x_MLNK: Tensor, lengths: Sequence[int], rank: int, group: str) -> Tensor:
    """The way back, and the adjoint: (M, sum(lengths), N / U, K) to (M, lengths[rank], N, K)."""
    batch, _, share, width = x_MLNK.shape
    shapes = [(batch, lengths[rank], share, width)] * len(lengths)
    return torch.cat(
        exchange(x_MLNK.split(list(lengths), dim=1), shapes, group_named(group)), dim=2
    )


@tokens_to_heads.register_fake
def _(x: Tensor, lengths: Sequence[int], rank: int, group: str) -> Tensor:
    return x.new_empty(x.shape[0], sum(lengths), x.shape[2] // len(lengths), x.shape[3])


@heads_to_tokens.register_fake
def _(x: Tensor, lengths: Sequence[int], rank: int, group: str) -> Tensor:
    return x.new_empty(x.shape[0], lengths[rank], x.shape[2] * len(lengths), x.shape[3])


def _setup(ctx: Any, inputs: tuple[Tensor, Sequence[int], int, str], output: Tensor) -> None:
    _, ctx.lengths, ctx.rank, ctx.group = inputs


def _to_tokens(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    return heads_to_tokens(dy.contiguous(), ctx.lengths, ctx.rank, ctx.group), None, None, None


def _to_heads(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    return tokens_to_heads(dy.contiguous(), ctx.lengths, ctx.rank, ctx.group), None, None, None


tokens_to_heads.register_autograd(_to_tokens, setup_context=_setup)
heads_to_tokens.register_autograd(_to_heads, setup_context=_setup)
