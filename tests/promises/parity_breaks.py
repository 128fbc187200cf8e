"""Ways to break training in several ranks, each of which the parity matrix must see; called in every rank of a cell.

Each replaces a function of the package in this process and returns nothing.
"""

import math
import os
from typing import Any

import torch

from sora_train.models.transformer import dit
from sora_train.objectives import text_to_video
from sora_train.parallel.context import ring
from sora_train.parallel.fsdp import FsdpEngine

RANK = int(os.environ.get("RANK", "0"))


def averaged_once_too_often() -> None:
    backward = FsdpEngine.backward
    FsdpEngine.backward = lambda self, loss, *, last: backward(self, loss / 2, last=last)


def noise_not_keyed() -> None:
    generator = torch.Generator().manual_seed(17)
    text_to_video.draw_noise = lambda seed, stream, keys, shape: torch.randn(
        len(keys), *shape, generator=generator
    )


def cp_ranks_with_different_noise() -> None:
    draw = text_to_video.draw_noise
    rank = int(os.environ["RANK"])
    text_to_video.draw_noise = lambda *how: draw(*how) + 1e-6 * rank


def reduce_missing_on_a_replicated_parameter() -> None:
    """What comes before the cut has gradients of the first rank's tokens alone."""
    forward = dit.Block.forward
    rank = int(os.environ["RANK"])

    def cut(self: Any, x: Any, captions: Any, modulation: Any, *rest: Any) -> Any:
        return forward(self, x, captions, modulation.detach() if rank else modulation, *rest)

    dit.Block.forward = cut


def norm_counted_over_replicas() -> None:
    norm = FsdpEngine.gradient_norm
    FsdpEngine.gradient_norm = lambda self: norm(self) * math.sqrt(2)


def ring_step_order_wrong() -> None:
    """The gradients of keys and values stay a step behind their block."""
    post = ring.Ring.post

    def wrong(self: Any, block: Any, room: Any, turn: int = 0) -> Any:
        return ring.Passing(block) if turn == 0 else post(self, block, room, turn)

    ring.Ring.post = wrong


def merge_sign_wrong() -> None:
    merge = ring.merge
    ring.merge = lambda out, lse, more, more_lse: (
        merge(out, -lse, more, -more_lse)[0] if lse.isfinite().all() else merge(out, lse, more, more_lse)[0],
        torch.logaddexp(lse, more_lse),
    )  # fmt: skip


def zero_weight_slot_leaks() -> None:
    terms = text_to_video.TextToVideoObjective.terms

    def leaking(self: Any, model: Any, batch: Any) -> Any:
        if batch.weight > 0:
            return terms(self, model, batch)
        lost = self.flow_batch(batch).losses(model).sum()
        return {"velocity": text_to_video.LossTerm(1e-3 * lost, 0.0)}

    text_to_video.TextToVideoObjective.terms = leaking
