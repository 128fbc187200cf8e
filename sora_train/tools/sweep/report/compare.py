"""Comparisons within a sweep: every group of runs against one of them."""

import math
from dataclasses import dataclass

from sora_train.errors import UserError
from sora_train.evaluation.paired import PairedDifference, of_pairs, of_steps, unlike
from sora_train.tools.sweep.report.rows import SEED, Row, SweepResults

LOSS = "train/loss"


@dataclass(frozen=True)
class GroupComparison:
    """A group of runs against the baseline's: the difference, or why there is none."""

    name: str
    rows: list[Row]
    difference: PairedDifference | None
    why: str
    of: str
    """The metric that is compared."""


def compare(
    results: SweepResults, baseline: str, confidence: float
) -> tuple[str, list[GroupComparison]]:
    """The baseline's name, and every other group against it.

    With two seeds or more in common, the sweep's metric is compared over seeds; else the training loss, over the steps
    of the one pair. `baseline` is a run's id, or empty for the best group.

    Raises UserError for a baseline that is none of the runs, or a confidence outside of 0 to 1.
    """
    if not 0 < confidence < 1:
        raise UserError(f"--confidence {confidence:g} must be between 0 and 1, for example 0.95")
    groups = results.groups()
    if baseline and baseline not in [row.id for row in results.rows]:
        raise UserError(
            f"--baseline {baseline} is no run of {results.folder}; there are: "
            f"{', '.join(sorted(row.id for row in results.rows))}"
        )
    base = next(row.group for row in results.rows if baseline in ("", row.id))
    others = [group for group in groups if group != base]
    return name_of(groups[base]), [
        against(results, groups[group], groups[base], confidence) for group in others
    ]


def against(
    results: SweepResults, ours: list[Row], theirs: list[Row], confidence: float
) -> GroupComparison:
    name, base = name_of(ours), {row.values.get(SEED, ""): row for row in theirs}
    pairs = [(row, base[seed]) for row in ours if (seed := row.values.get(SEED, "")) in base]
    pairs = [(a, b) for a, b in pairs if a.metrics and b.metrics]
    if not pairs:
        return GroupComparison(
            name, ours, None, "no run of the same seed has taken a step in both", ""
        )
    why = next(filter(None, (unlike(a.config, b.config) for a, b in pairs)), "")
    if why:
        return GroupComparison(name, ours, None, why, "")
    finals = [(a.final(results.metric), b.final(results.metric)) for a, b in pairs]
    finals = [(a, b) for a, b in finals if math.isfinite(a) and math.isfinite(b)]
    if len(finals) > 1:
        a, b = zip(*finals, strict=True)
        return GroupComparison(name, ours, of_pairs(a, b, confidence, "seeds"), "", results.metric)
    return of_one_pair(name, ours, pairs[0], confidence)


def of_one_pair(
    name: str, rows: list[Row], pair: tuple[Row, Row], confidence: float
) -> GroupComparison:
    curves = [row.curve(LOSS) for row in pair]
    if not curves[0].keys() & curves[1].keys():
        return GroupComparison(name, rows, None, f"they have no step with {LOSS} in common", "")
    lost = [row.id for row, curve in zip(pair, curves, strict=True) if _lost(curve)]
    if lost:
        return GroupComparison(
            name, rows, None, f"{lost[0]} has steps whose loss is not finite", ""
        )
    return GroupComparison(name, rows, of_steps(curves[0], curves[1], confidence), "", LOSS)


def name_of(rows: list[Row]) -> str:
    """The values of a group; of a group of one without any, the run's own name."""
    return ", ".join(f"{key}={value}" for key, value in rows[0].group) or rows[0].id


def _lost(curve: dict[int, float]) -> bool:
    return not all(map(math.isfinite, curve.values()))
