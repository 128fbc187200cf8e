"""In what two checkpoints differ, for `sora ckpt diff`: their state, their config and each tensor.

Two tensors of one name are in memory at a time.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sora_train.base.progress import Progress
from sora_train.checkpoint import Checkpoint
from sora_train.checkpoint.tensors import StoredTensors, chunks
from sora_train.config.resumption import differences
from sora_train.errors import UserError

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Difference:
    """How far two tensors of one name are apart.

    Attributes:
        largest: the greatest absolute difference of two values.
        relative: the L2 norm of the difference over that of the first tensor.
        moved: share of values that are not the same bit for bit (NaN is like NaN).
    """

    name: str
    largest: float
    relative: float
    moved: float


def state_rows(one: Checkpoint, other: Checkpoint) -> Rows:
    """(key, first value, second value) wherever state, spec or config differ; long lists as their lengths."""
    ours, theirs = dict(one.state()), dict(other.state())
    sections: Rows = []
    for key in dict.fromkeys([*ours, *theirs]):
        sections += [
            (path, _short(old), _short(new))
            for path, old, new in differences(ours.get(key), theirs.get(key), key)
        ]
    return sections


def _short(value: Any) -> str:
    if isinstance(value, list) and len(str(value)) > 60:
        return f"list of {len(value)}"
    return "(absent)" if value is None else str(value)


def only_in(one: StoredTensors, other: StoredTensors) -> list[str]:
    return [name for name in one.shapes if name not in other.shapes]


def reshaped(one: StoredTensors, other: StoredTensors) -> list[str]:
    return [
        f"{name} {list(shape)} against {list(other.shapes[name])}"
        for name, shape in one.shapes.items()
        if other.shapes.get(name, shape) != shape
    ]


def tensor_differences(
    one: StoredTensors, other: StoredTensors, pattern: str = ""
) -> list[Difference]:
    """Of every tensor that both have in one shape and whose name holds `pattern`, farthest apart first.

    Raises:
        UserError: there is none.
    """
    names = [
        name
        for name, shape in one.shapes.items()
        if other.shapes.get(name) == shape and pattern in name
    ]
    if not names:
        what = f"whose name holds '{pattern}'" if pattern else "of one name and shape"
        raise UserError(
            f"{one.checkpoint.path} and {other.checkpoint.path} have no tensor in common {what}"
        )
    differences = []
    with Progress(len(names), "comparing tensors", enabled=len(names) > 200) as progress:
        for number, name in enumerate(names, 1):
            differences.append(difference(name, one.read(name)[name], other.read(name)[name]))
            progress.update(number)
    return sorted(differences, key=lambda row: (-_order(row.relative), row.name))


def difference(name: str, one: Tensor, other: Tensor) -> Difference:
    largest = square = norm = 0.0
    moved = 0
    for ours, theirs in chunks(one, other):
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())
        gap = torch.where(same, 0.0, ours - theirs)
        moved += int((~same).sum())
        # A value that is not finite on one side alone makes the maximum say so.
        largest = max(largest, _order(float(gap.abs().max()))) if gap.numel() else largest
        square += float(gap.square().sum())
        norm += float(ours.square().sum())
    relative = math.sqrt(square / norm) if norm else (math.inf if square else 0.0)
    return Difference(name, largest, relative, moved / max(1, one.numel()))


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


TENSOR_COLUMNS = ("tensor", "largest difference", "relative L2", "values that moved")


def rows(differences: list[Difference]) -> Rows:
    return [
        (row.name, f"{row.largest:.3e}", f"{row.relative:.3e}", f"{row.moved:.1%}")
        for row in differences
    ]
