"""The table at the end of a comparison: both runs beside each other, and which one is better."""

import json
import math

from sora_train.base.files import read_json, write_atomically
from sora_train.config.schema import flatten
from sora_train.monitoring.metrics import read_metrics
from sora_train.tools.sweep.ab.race import LOSS, Difference, as_json
from sora_train.tools.sweep.ab.sides import PAIR, Pair
from sora_train.tools.sweep.report.report import number

TABLE = "ab.md"
BESIDE = {
    "train/step_seconds": "seconds a step",
    "train/tokens_per_second": "tokens a second",
}
"""Metrics that are shown without an interval, by what they are called: means over the steps in common."""


def write_report(pair: Pair, found: Difference) -> str:
    """The table and the verdict as text; both lie in the folder afterwards, as `ab.md` and in `ab.json`."""
    text = f"{table(pair, found)}\n\n{verdict(pair, found)}\n"
    write_atomically(pair.folder / TABLE, text)
    facts = (read_json(pair.folder / PAIR) or {}) | {
        "difference": as_json(found),
        "differing": list(pair.differing),
    }
    write_atomically(pair.folder / PAIR, json.dumps(facts, indent=1))
    return text


def table(pair: Pair, found: Difference) -> str:
    interval = found.interval
    rows = [["", "a", "b", "a - b", f"{found.confidence:.0%} interval"]]
    rows += [[key, *(str(value) for value in values), "", ""] for key, values in _keys(pair)]
    metrics = [read_metrics(pair.folder / name / "metrics.jsonl") for name in "ab"]
    counted = [
        {int(row["step"]): row for row in of_side if found.first <= row["step"] <= found.last}
        for of_side in metrics
    ]
    bounds = "" if math.isnan(interval.low) else f"{interval.low:+.4g} to {interval.high:+.4g}"
    rows.append([f"{LOSS}, steps {found.first} to {found.last}", *_means(counted, LOSS), bounds])
    last = _last_validated(metrics)
    for name in sorted(key for key in last[0] if key.startswith("val/") and key in last[1]):
        a, b = last[0][name], last[1][name]
        cells = [number(a), number(b), f"{a - b:+.4g}", ""]
        rows.append([f"{name}, step {int(last[0]['step'])}", *cells])
    for name, called in BESIDE.items():
        if any(name in row for row in counted[0].values()):
            rows.append([called, *_means(counted, name), ""])
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * 5, *body])


def verdict(pair: Pair, found: Difference) -> str:
    """One sentence: which is better, or that nothing is shown."""
    interval = found.interval
    where = f"after {found.last} of {pair.steps} steps"
    if not interval.sure:
        return f"No difference in {LOSS} is shown {where}."
    better, worse = ("a", "b") if interval.mean < 0 else ("b", "a")
    return f"{better} is better than {worse} by {abs(interval.mean):.4g} of {LOSS} {where}."


def _keys(pair: Pair) -> list[tuple[str, list[object]]]:
    dotted = [flatten(side.config.model_dump(mode="json")) for side in (pair.a, pair.b)]
    return [(key, [values.get(key, "") for values in dotted]) for key in pair.differing]


def _means(counted: list[dict[int, dict[str, float]]], name: str) -> list[str]:
    both = sorted(counted[0].keys() & counted[1].keys())
    values = [[side[step][name] for step in both if name in side[step]] for side in counted]
    means = [math.fsum(of_side) / len(of_side) if of_side else math.nan for of_side in values]
    return [*map(number, means), f"{means[0] - means[1]:+.4g}" if both else ""]


def _last_validated(metrics: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """The rows of the last step at which both were validated."""
    validated = [
        {int(row["step"]): row for row in of_side if "val/loss" in row} for of_side in metrics
    ]
    both = validated[0].keys() & validated[1].keys()
    return [side[max(both)] for side in validated] if both else [{}, {}]
