"""Context parallelism: the tokens of one clip on several ranks, applied to a plain model from outside.

Tokens are cut along P before the first block and joined after the last; norms, modulation, MLPs and
attention to the caption need nothing of other ranks. Self-attention does: `ulysses` ranks exchange
their tokens for heads (Jacobs et al. 2023, arXiv:2309.14509), and such groups, `ring` of them, pass
their keys and values round (ring.py). Segments differ by one token a frame at most, and where a
frame has fewer tokens than there are ranks some hold none.

Every rank ends with the whole velocity and the whole loss, of which the engine takes 1 / cp; each
exchange's backward is its true adjoint. A parameter's gradients, summed over the ranks, are then
those of one process wherever it stands: before the cut, between, or after.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sora_train.errors import ConfigError
from sora_train.models.transformer.dit import VideoDiT
from sora_train.parallel.context.collectives import gather_tokens, heads_to_tokens, tokens_to_heads
from sora_train.parallel.context.ring import ring_attention
from sora_train.parallel.degrees import Degrees
from sora_train.parallel.parallelize import transformers_of
from sora_train.runtime.world import World


@dataclass(frozen=True)
class ContextGroups:
    """This rank's groups: all that share a clip's tokens, those it exchanges heads with, and its ring."""

    whole: Any
    ulysses: Any
    ring: Any

    @classmethod
    def of(cls, own: dict[str, Any]) -> "ContextGroups":
        """From this rank's groups by their names in `neighbours`."""
        whole = own["whole"]
        return cls(whole, own.get("ulysses", whole), own.get("ring", whole))


def neighbours(world_size: int, degrees: Degrees) -> dict[str, list[list[int]]]:
    """The ranks of every group, of all ranks: `ulysses` runs fastest, then `ring`; where one of them is 1 the whole
    stands for the other."""
    ulysses, cp = degrees.ulysses, degrees.cp
    starts = range(0, world_size, cp)
    whole = [list(range(start, start + cp)) for start in starts]
    if 1 in (ulysses, degrees.ring):
        return {"whole": whole}
    return {
        "whole": whole,
        "ulysses": [list(range(first, first + ulysses)) for first in range(0, world_size, ulysses)],
        "ring": [
            list(range(start + place, start + cp, ulysses))
            for start in starts
            for place in range(ulysses)
        ],
    }


def make_context_groups(degrees: Degrees, world: World) -> ContextGroups | None:
    """This rank's groups, or None where `degrees.cp` is 1. A collective: all ranks make all groups, in one order."""
    if degrees.cp == 1:
        return None
    own: dict[str, Any] = {}
    for name, groups in neighbours(world.size, degrees).items():
        for ranks in groups:
            group = dist.new_group(ranks, timeout=world.timeout)
            if world.rank in ranks:
                own[name] = group
    return ContextGroups.of(own)


class TokenCut:
    """How the tokens of the clips at hand are cut: set where they enter, asked wherever they are exchanged.

    Lengths stand as the sizes of empty tensors, so that to a compiler they are sizes like all others
    and not constants to compile for. A recomputed block finds those of the last forward, which is its own as
    long as each forward's backward comes before the next forward.
    """

    def __init__(self, degrees: Degrees, groups: ContextGroups):
        self.degrees, self.groups = degrees, groups
        self.rank = dist.get_rank(groups.whole)
        self.sizes: list[int] = []
        """Tokens of a frame that each rank holds."""
        self.ulysses = self.ring = torch.empty(0)
        """(0, L, L, ...): tokens of a clip that each rank of this rank's group holds; of the ring, each group
        of `ulysses` ranks together."""

    def enter(self, num_frames: int, tokens: int) -> slice:
        """Cut frames of so many tokens; returns this rank's part of each."""
        self.sizes = segments(tokens, self.degrees.cp)
        lengths = [num_frames * size for size in self.sizes]
        step = self.degrees.ulysses
        groups = [lengths[start : start + step] for start in range(0, len(lengths), step)]
        self.ulysses = torch.empty(0, *groups[self.rank // step])
        self.ring = torch.empty(0, *map(sum, groups))
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])


def segments(tokens: int, ranks: int) -> list[int]:
    """Sizes of the ranks' parts: equal but for the first ones, which take one token more of what is left."""
    size, rest = divmod(tokens, ranks)
    return [size + (rank < rest) for rank in range(ranks)]


class EnterSeam(nn.Module):
    """This rank's part of the tokens (B, T, P, D), or of their rotary table (2, T, P, ...).

    Backward needs no exchange: each rank has the gradient by way of its own tokens, and these add up
    where all gradients do.
    """

    def __init__(self, cut: TokenCut):
        super().__init__()
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, self.cut.enter(*x.shape[1:3])].contiguous()


class LeaveSeam(nn.Module):
    """All ranks' tokens (B, T, P, ...) again, on every rank."""

    def __init__(self, cut: TokenCut):
        super().__init__()
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        return gather_tokens(x, self.cut.sizes, self.cut.groups.whole)


class ContextAttention(nn.Module):
    """The core of self-attention over the tokens of all ranks, around the model's own core.

    Queries and keys take the values' dtype before they travel.
    """

    def __init__(self, core: nn.Module, cut: TokenCut):
        super().__init__()
        self.core, self.cut = core, cut
        self.ulysses, self.ring = cut.degrees.ulysses, cut.degrees.ring
        self.rank = cut.rank % self.ulysses
        self.ulysses_name = cut.groups.ulysses.group_name
        self.ring_name = cut.groups.ring.group_name

    def forward(
        self, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, key_mask_BS: Tensor | None = None
    ) -> Tensor:
        if key_mask_BS is not None:
            raise ValueError("tokens that are cut over ranks take no key mask")
        q, k, v = q_BLNK.to(v_BLNK.dtype), k_BLNK.to(v_BLNK.dtype), v_BLNK
        lengths = self.cut.ulysses.shape[1:]
        if self.ulysses > 1:
            # One exchange for all three.
            together = torch.cat([q, k, v])
            q, k, v = tokens_to_heads(together, lengths, self.rank, self.ulysses_name).chunk(3)
        y: Tensor = self._over_groups(q, k, v) if self.ring > 1 else self.core(q, k, v)
        if self.ulysses > 1:
            y = heads_to_tokens(y.contiguous(), lengths, self.rank, self.ulysses_name)
        return y

    def _over_groups(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ring_attention(q, k, v, self.cut.ring.shape[1:], self.ring_name)


class CaptionAttention(nn.Module):
    """The core of attention to captions on a rank that may hold no tokens, which not every kernel takes."""

    def __init__(self, core: nn.Module):
        super().__init__()
        self.core = core

    def forward(
        self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor, key_mask_BS: Tensor | None = None
    ) -> Tensor:
        if q_BLNK.shape[1]:
            y: Tensor = self.core(q_BLNK, k_BSNK, v_BSNK, key_mask_BS)
            return y
        # Empty, but keys and values still have a gradient, of zeros, as they have on the other ranks.
        return q_BLNK.to(v_BSNK.dtype) + (k_BSNK.sum() + v_BSNK.sum())


def apply_context_parallel(
    model: nn.Module, degrees: Degrees, groups: ContextGroups | None
) -> None:
    """Cut the model's tokens over the ranks of `groups`, in place; without groups the model stays as it is.

    Call it before blocks are compiled or sharded.

    Raises:
        ConfigError: the model has no tokens that can be cut.
    """
    if groups is None:
        return
    cut = TokenCut(degrees, groups)
    for transformer in transformers_of(model):
        if not isinstance(transformer, VideoDiT):
            raise ConfigError(
                f"parallel.ulysses={degrees.ulysses} and parallel.ring={degrees.ring} divide the tokens of VideoDiT, "
                f"and this run trains {type(transformer).__name__}; set both to 1"
            )
        transformer.enter, transformer.leave = EnterSeam(cut), LeaveSeam(cut)
        for block in transformer.blocks:
            block.attn1.core = ContextAttention(block.attn1.core, cut)
            block.attn2.core = CaptionAttention(block.attn2.core)
