"""Ring attention: every rank keeps its queries, keys and values are passed round (Liu et al. 2023,
arXiv:2310.01889).

What a rank makes of one block of keys is exact but for its softmax's denominator, so blocks carry
the logarithm of theirs (the log-sum-exp) and are merged by it, in at least float32. Backward is a
ring of its own: given the log-sum-exp over all keys the gradient of each block stands by itself
(Dao 2023, arXiv:2307.08691, section 3.1.2), and the gradient of a block's keys and values travels
with it until it is home. No token is masked from another, so ranks that hold equally many tokens
have equally much to do in every round. The next block is on its way while the present one is
computed, as far as the backend sends in the background.

Dimension key: B clips, N heads, L queries, S keys, K head width.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.models.transformer.layers import at_least_fp32, work_dtype
from sora_train.parallel.context.collectives import group_named

MAX_SCORES = 1 << 21
"""Scores of one chunk of queries over all heads and clips: 8 MiB in float32."""


def ring_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], group: str) -> Tensor:
    """softmax(Q K^T / sqrt(K)) V over the keys of all ranks, in the dtype of v.

    Args:
        q, k, v: this rank's tokens, (B, L, N, K), of one dtype; L may be 0.
        lengths: tokens of each rank of the group, in its order.
    """
    out: Tensor = torch.ops.sora.ring_attention(q, k, v, lengths, group)[0]
    return out


@torch.library.custom_op("sora::ring_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], group: str
) -> tuple[Tensor, Tensor]:
    """Returns the output (B, L, N, K) and the log-sum-exp over all keys (B, N, L)."""
    ring = Ring(lengths, group)
    queries = q.transpose(1, 2)
    out = torch.zeros_like(at_least_fp32(queries))
    lse = out.new_full(out.shape[:-1], -math.inf)
    block = torch.stack([k, v])
    for turn in range(ring.size):
        coming = ring.post(block, block.new_empty(ring.shape(block, turn + 1)), turn + 1)
        if queries.shape[2] and block.shape[2]:
            out, lse = merge(out, lse, *block_forward(queries, *block.transpose(2, 3)))
        block = coming.wait()
    return out.transpose(1, 2).to(v.dtype).contiguous(), lse


@torch.library.custom_op("sora::ring_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    ring = Ring(lengths, group)
    queries, answers, cotangents = (x.transpose(1, 2) for x in (q, out, dout))
    dq = torch.zeros_like(at_least_fp32(queries))
    block, arriving = torch.stack([k, v]), Passing()
    for turn in range(ring.size):
        coming = ring.post(block, block.new_empty(ring.shape(block, turn + 1)), turn + 1)
        sums = dq.new_zeros(block.shape)
        if queries.shape[2] and block.shape[2]:
            keys, values = block.transpose(2, 3)
            grads = block_backward(cotangents, queries, keys, values, answers, lse)
            dq += grads[0]
            sums += torch.stack(grads[1:]).transpose(2, 3)
        if turn:
            sums += arriving.wait()
        # The sums of a block go where the block goes, one turn behind it, and at last home.
        arriving = ring.post(sums, sums.new_empty(ring.shape(sums, turn + 1)))
        block = coming.wait()
    dk, dv = arriving.wait()
    # Outputs of an operator share no memory.
    return (
        dq.transpose(1, 2).to(q.dtype).contiguous(),
        dk.to(k.dtype, copy=True),
        dv.to(v.dtype, copy=True),
    )


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], group: str) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (batch, heads, length), dtype=wide
    )


@_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.lengths, ctx.group = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    dq, dk, dv = torch.ops.sora.ring_attention_backward(
        dout.contiguous(), *ctx.saved_tensors, ctx.lengths, ctx.group
    )
    return dq, dk, dv, None, None


_forward.register_autograd(_gradients, setup_context=_setup)


class Passing:
    """A tensor on its way to this rank."""

    def __init__(self, coming: Tensor | None = None, kept: Tensor | None = None, works: Any = ()):
        self.coming, self.works = coming, works
        # What is being sent must not be freed before it is gone.
        self.kept = kept

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        self.kept = None
        assert self.coming is not None
        return self.coming


class Ring:
    """A group of ranks in a circle: in every turn each gives to the next one and takes from the one before."""

    def __init__(self, lengths: Sequence[int], group: str):
        self.lengths, self.group = lengths, group_named(group)
        self.size, self.rank = len(lengths), dist.get_rank(self.group)

    def shape(self, block: Tensor, turn: int) -> tuple[int, ...]:
        """The shape of the block (2, B, S, N, K) that is here in this turn: that of the rank `turn` places back."""
        return (*block.shape[:2], self.lengths[(self.rank - turn) % self.size], *block.shape[3:])

    def post(self, block: Tensor, room: Tensor, turn: int = 0) -> Passing:
        """Send a block on and receive the next one into `room`; nothing moves in the turn that is no more."""
        if turn == self.size:
            return Passing(block)
        works = []
        moves = (
            (dist.isend, block, (self.rank + 1) % self.size),
            (dist.irecv, room, (self.rank - 1) % self.size),
        )
        ops = [
            dist.P2POp(move, tensor, group=self.group, group_peer=peer)
            for move, tensor, peer in moves
            if tensor.numel()
        ]
        if ops:
            works = dist.batch_isend_irecv(ops)
        return Passing(room, block, works)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each, (B, N, L, K) with its log-sum-exp (B, N, L)."""
    total = torch.logaddexp(lse, more_lse)
    old, new = (lse - total).exp()[..., None], (more_lse - total).exp()[..., None]
    return out * old + more * new, total


def block_forward(q_BNLK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over one block of keys and its log-sum-exp (B, N, L), both in at least float32."""
    if _flashes(q_BNLK):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q_BNLK, k_BNSK, v_BNSK)
        return at_least_fp32(out), lse
    work = work_dtype(v_BNSK)
    keys, values = k_BNSK.to(work).transpose(-1, -2).contiguous(), v_BNSK.to(work).contiguous()
    outs, sums = [], []
    for rows in _chunks(q_BNLK, k_BNSK):
        scores = _scores(q_BNLK[:, :, rows], keys, work)
        lse = scores.logsumexp(dim=-1)
        outs.append(at_least_fp32(scores.sub_(lse[..., None]).exp_().to(work) @ values))
        sums.append(lse)
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def block_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) by way of one block of keys, in at least float32.

    `out` and `lse` are those over all keys: exp(score - lse) is then each key's true weight.
    """
    if _flashes(q):
        return _flash_backward(dout, q, k, v, out, lse)
    work = work_dtype(v)
    keys, values = k.to(work).contiguous(), v.to(work).contiguous()
    dk, dv = (
        torch.zeros_like(at_least_fp32(x), memory_format=torch.contiguous_format) for x in (k, v)
    )
    dqs, scale = [], 1.0 / math.sqrt(q.shape[-1])
    for rows in _chunks(q, k):
        cotangent, query = dout[:, :, rows].to(work), q[:, :, rows]
        scores = _scores(query, keys.transpose(-1, -2), work)
        weights = scores.sub_(lse[:, :, rows, None]).exp_()
        answered = at_least_fp32(dout[:, :, rows]) * at_least_fp32(out[:, :, rows])
        dv += weights.to(work).transpose(-1, -2) @ cotangent
        dweights = at_least_fp32(cotangent @ values.transpose(-1, -2))
        dscores = (weights * (dweights - answered.sum(dim=-1, keepdim=True)) * scale).to(work)
        dk += dscores.transpose(-1, -2) @ query.to(work)
        dqs.append(at_least_fp32(dscores @ keys))
    return torch.cat(dqs, dim=2), dk, dv


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # Without dropout the state of its generator is not looked at.
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, seed, seed[:0]
    )
    return at_least_fp32(dq), at_least_fp32(dk), at_least_fp32(dv)


def _flashes(x: Tensor) -> bool:
    """Whether a block goes to the flash kernel: half precision on a GPU, and a head width it takes.

    All else is matrix products over chunks of the queries, on any device. The flash path has not
    run on a GPU yet.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and half and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256


def _chunks(q: Tensor, k: Tensor) -> list[slice]:
    """Slices of the queries with at most MAX_SCORES scores each."""
    batch, heads, length, _ = q.shape
    rows = max(1, MAX_SCORES // max(1, batch * heads * k.shape[2]))
    return [slice(start, min(start + rows, length)) for start in range(0, length, rows)]


def _scores(q: Tensor, keys: Tensor, work: torch.dtype) -> Tensor:
    # Scaled behind the product: before it, a bfloat16 q would be rounded once more, but for widths of a power of 4.
    return at_least_fp32(q.to(work) @ keys) * (1.0 / math.sqrt(q.shape[-1]))
