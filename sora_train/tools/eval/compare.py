"""Two evaluations, clip by clip: same prompt, same noise, so that the luck of the draw goes out in the difference."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from sora_train.base.files import write_atomically
from sora_train.errors import UserError
from sora_train.evaluation.cases import Sampled
from sora_train.evaluation.paired import PairedDifference, of_pairs
from sora_train.tools.eval.results import CONFIDENCE, Evaluation, metric_of

LEAST_EQUAL = 6
"""Pairs that must differ alike, where all do, before it is told: fewer happen by chance once in twenty times."""


@dataclass(frozen=True)
class Compared:
    """A metric of two evaluations over the clips that both have."""

    group: str
    name: str
    first: float
    second: float
    difference: PairedDifference
    """The second less the first."""
    clips: int = 1

    @property
    def verdict(self) -> str:
        """Which of the two is better, as far as the interval tells."""
        better = metric_of(self.name).better
        if math.isnan(self.difference.low):
            return "one number each" if metric_of(self.name).of_set else "too few clips to tell"
        is_even = self.difference.low == self.difference.high != 0
        if is_even and self.clips < LEAST_EQUAL:
            return "too few clips to tell"
        if not self.difference.sure:
            return "no difference told"
        if not better:
            return "they differ"
        more = self.difference.mean > 0
        return "second" if more == (better == "higher") else "first"


def compared(first: Evaluation, second: Evaluation) -> list[Compared]:
    """Every metric that both have on clips of one group, number and prompt.

    Of a metric that is better near 0 the distances from 0 are compared, so that signs do not cancel.

    Raises UserError where they share no clip.
    """
    pairs = _pairs(first.clips, second.clips)
    if not pairs:
        raise UserError(
            f"{first.name} and {second.name} share no prompt, so their clips are no pairs; give both the same --prompts"
        )
    found = []
    for group in dict.fromkeys(one.case.group for one, _ in pairs):
        inside = [(a.numbers, b.numbers) for a, b in pairs if a.case.group == group]
        for name in dict.fromkeys(name for a, b in inside for name in a if name in b):
            values = [(a[name], b[name]) for a, b in inside if name in a and name in b]
            found.append(_of(group, name, values))
    for name in first.of_set.keys() & second.of_set.keys():
        a, b = first.of_set[name], second.of_set[name]
        nothing = PairedDifference(b - a, math.nan, math.nan, math.nan, "1 number")
        found.append(Compared("all", name, a, b, nothing))
    return found


def _of(group: str, name: str, values: Sequence[tuple[float, float]]) -> Compared:
    near_zero = metric_of(name).better == "zero"
    ours, theirs = (
        [abs(value) if near_zero else value for value in side] for side in zip(*values, strict=True)
    )
    difference = of_pairs(theirs, ours, CONFIDENCE, "clips")
    return Compared(group, name, fmean(ours), fmean(theirs), difference, len(values))


def write(found: Sequence[Compared], first: Evaluation, second: Evaluation, path: Path) -> None:
    """The comparison as JSON."""
    rows = [
        {
            "group": one.group,
            "metric": one.name,
            "first": one.first,
            "second": one.second,
            "difference": one.difference.mean,
            "low": None if math.isnan(one.difference.low) else one.difference.low,
            "high": None if math.isnan(one.difference.high) else one.difference.high,
            "over": one.difference.over,
            "better": one.verdict,
        }
        for one in found
    ]
    about = {"first": first.name, "second": second.name, "confidence": CONFIDENCE}
    write_atomically(path, json.dumps(about | {"metrics": rows}, indent=1))


def _pairs(first: Sequence[Sampled], second: Sequence[Sampled]) -> list[tuple[Sampled, Sampled]]:
    """Clips of the same group and prompt, the first with the first, and so on."""
    waiting: dict[tuple[str, str], list[Sampled]] = {}
    for one in second:
        waiting.setdefault((one.case.group, one.case.prompt), []).append(one)
    found = []
    for one in first:
        others = waiting.get((one.case.group, one.case.prompt))
        if others:
            found.append((one, others.pop(0)))
    return found
