"""The numbers of a computed step that decide whether it is taken, judged where they are computed.

Loss and gradient norm are summed over the ranks and compared with their limits on the device, so that the update is
queued right behind the backward pass and takes effect, or does not, by a flag that the host has not seen. The numbers
set out for the host before the update does: reading them is a step's one wait for the device, and the update runs
meanwhile.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from sora_train.data.sample import ClipBatch
from sora_train.device.transfer import ToHost, to_device
from sora_train.objectives import LossTerm
from sora_train.runtime.world import World
from sora_train.training.outputs.step_metrics import kinds_in, told_apart
from sora_train.training.resilience.spike_detector import Limits

Terms = dict[str, LossTerm]


@dataclass(frozen=True)
class Found:
    """A step's numbers on the host, in float64; all but `parts` are the same on every rank."""

    sums: dict[str, float]
    """Each term's sum over all ranks and micro-batches."""
    judged: float
    """The part of the loss that is compared with its limit."""
    grad_norm: float
    parts: list[Terms]
    """This rank's micro-batches; their tensors are on the host."""


class Outcome:
    """The numbers on the device, and the flag.

    Attributes:
        bad: whether the step is not to be taken, a 0-d bool on the device.
    """

    def __init__(
        self,
        batches: Sequence[ClipBatch],
        parts: Sequence[Terms],
        totals: Mapping[str, float],
        grad_norm: Tensor,
        limits: Limits,
        world: World,
    ):
        """A collective. `totals` is each term's total weight over all ranks; `grad_norm` is 0-d."""
        device = grad_norm.device
        self._parts, self._names = parts, list(totals)
        zero = torch.zeros((), dtype=torch.float64, device=device)
        # A micro-batch may be without a term: an image has none of motion.
        sums = [
            torch.stack([t[n].sum.detach().double() if n in t else zero for t in parts]).sum()
            for n in self._names
        ]
        unjudged = unjudged_part(batches, parts, totals, limits, device)
        mine = torch.stack([*sums, unjudged, grad_norm.double()])
        if world.size > 1:
            # Ranks that share a micro-batch all hold its whole loss: the first of them speaks.
            mine = mine * float(world.cp_rank == 0)
            dist.all_reduce(mine)
        *summed, unjudged, norms = mine.unbind()
        # A mean of equal numbers, so that whatever is decided by it is decided alike.
        norm = norms / world.dp_size
        loss = sum(part / max(totals[n], 1.0) for n, part in zip(self._names, summed, strict=True))
        judged = loss - unjudged
        sound = loss.isfinite() & norm.isfinite()
        self.bad = ~sound | (judged > limits.loss) | (norm > limits.grad_norm)
        self._shared = ToHost(torch.stack([*summed, judged, norm]))
        self._own = ToHost(torch.cat([term.sum.double()[None] for term in self._terms()]))
        told = [x.double() for term in self._terms() if (x := term.per_sample) is not None]
        self._told = ToHost(torch.cat(told)) if told else None

    def read(self) -> Found:
        """The numbers, as soon as they are on the host; it does not wait for what was queued since."""
        *sums, judged, norm = self._shared.read().tolist()
        own, told = iter(self._own.read()), self._told.read() if self._told else None
        parts, place = [], 0
        for terms in self._parts:
            on_host = {}
            for name, term in terms.items():
                each = term.per_sample
                if each is not None:
                    assert told is not None
                    each, place = told[place : place + len(each)], place + len(each)
                on_host[name] = replace(term, sum=next(own), per_sample=each)
            parts.append(on_host)
        return Found(dict(zip(self._names, sums, strict=True)), judged, norm, parts)

    def _terms(self) -> Iterator[LossTerm]:
        return (term for terms in self._parts for term in terms.values())


def unjudged_part(
    batches: Sequence[ClipBatch],
    parts: Sequence[Terms],
    totals: Mapping[str, float],
    limits: Limits,
    device: torch.device,
) -> Tensor:
    """This rank's part of the loss of clips whose kind has no level yet, 0-d float64 on the device."""
    found = torch.zeros((), dtype=torch.float64, device=device)
    if not limits.unjudged:
        return found
    for batch, terms in zip(batches, parts, strict=True):
        kinds = [kind for kind, _ in kinds_in(batch, terms)]
        counts = torch.tensor([float(kind in limits.unjudged) for kind in kinds]).double()
        if not counts.any():
            continue
        if told_apart(batch, terms):
            ((name, term),) = terms.items()
            assert term.per_sample is not None
            each = term.per_sample.double() * to_device(counts, device)
            found = found + each.sum() / max(totals[name], 1.0)
        else:
            for name, term in terms.items():
                found = found + term.sum.double() / max(totals[name], 1.0)
    return found
