"""Decoding in time over ranks: each takes every so-many-th latent frame, and no bit differs from one process.

AutoencoderKLWan's convolutions over time look two frames back. What a process alone keeps from the latent frame before
is here given by the rank that had that frame, at each convolution, just before it is needed: ranks go through the
layers side by side, so none waits for another to be done with a frame.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sora_train.models.vae.stream import CACHED_FRAMES, Pieces, decode_pieces
from sora_train.parallel.context.collectives import exchange, gather


class FramesInTurn:
    """`decode_pieces` of a group of ranks that all call it with the same latents and leave with all pixels.

    The first latent frame, which becomes one frame, is decoded by every rank; then rank r takes each group-size-th.
    """

    def __init__(self, group: Any):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __call__(self, autoencoder: nn.Module, raw: Tensor, tile: int = 0) -> Pieces:
        """See `decode_pieces`."""
        last = raw.shape[2] - 1
        turns = [1 + self.rank + start for start in range(0, last, self.size)]
        pieces = decode_pieces(autoencoder, raw, tile, [0, *turns])
        with looking_back(autoencoder.decoder, self.group) as history:
            # The order begins anew with each tile.
            for frame in itertools.cycle([0, *turns]):
                history.enter(frame)
                piece = next(pieces, None)
                if piece is None:
                    return
                frames, part, pixels = piece
                if frame == 0:
                    yield frames, part, pixels
                    continue
                count = pixels.shape[2]
                found = gather(pixels.contiguous(), [tuple(pixels.shape)] * self.size, self.group)
                for rank, of_rank in enumerate(found[: last - (frame - self.rank) + 1]):
                    start = frames.start + (rank - self.rank) * count
                    yield slice(start, start + count), part, of_rank


class History:
    """The frames before a rank's own, at each convolution over time; a hook before its call."""

    def __init__(self, group: Any):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.is_first = True
        self._first: dict[nn.Module, Tensor] = {}
        self._early: dict[tuple[nn.Module, int], Tensor] = {}
        """What ranks behind this one gave in the turn before, by how far back it lies."""

    def enter(self, frame: int) -> None:
        """Say which latent frame is decoded next: the clip's first one, which every rank decodes, or another."""
        self.is_first = frame == 0
        if self.is_first:
            self._first, self._early = {}, {}

    def __call__(self, conv: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if self.is_first:
            self._first[conv] = x
            return args
        take = min(x.shape[2], CACHED_FRAMES)
        back = range(CACHED_FRAMES // take, 0, -1)
        tail, nothing = x[:, :, -take:], x[:, :, :0]
        takers = {(self.rank + away) % self.size for away in back}
        givers = {(self.rank - away) % self.size for away in back}
        received = exchange(
            [tail if peer in takers else nothing for peer in range(self.size)],
            [tail.shape if peer in givers else nothing.shape for peer in range(self.size)],
            self.group,
        )
        before = []
        for away in back:
            given = received[(self.rank - away) % self.size]
            if away > self.rank:
                # It is of this turn, and comes before this rank's next frame.
                key = conv, away
                given, self._early[key] = self._early.get(key), given
                if given is None:
                    given = self._beginning(conv, x, take, away - self.rank)
            before.append(given)
        return x, torch.cat(before, dim=2)

    def _beginning(self, conv: nn.Module, x: Tensor, take: int, away: int) -> Tensor:
        """`take` frames that end `away` latent frames before the second one: the first one, and nothing before it."""
        none = x.new_zeros(*x.shape[:2], CACHED_FRAMES, *x.shape[3:])
        end = CACHED_FRAMES - (away - 1) * take
        whole = torch.cat([none, self._first.get(conv, none)], dim=2)[:, :, -CACHED_FRAMES:]
        return whole[:, :, end - take : end]


@contextmanager
def looking_back(decoder: nn.Module, group: Any) -> Iterator[History]:
    """Have the decoder's convolutions over time ask other ranks for the frames before theirs."""
    history = History(group)
    with ExitStack() as hooks:
        for conv in decoder.modules():
            padding: Sequence[int] = getattr(conv, "_padding", ())
            # (columns, columns, rows, rows, frames before, frames after), of a causal convolution.
            if len(padding) == 6 and padding[4]:
                hook = conv.register_forward_pre_hook(history)
                hooks.callback(hook.remove)
        yield history
