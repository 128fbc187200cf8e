"""What was measured of a clip as sentences behind its caption: "Motion: high. Camera: pan left. 24 fps." """

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LEVELS = ("very low", "low", "medium", "high", "very high")


def sentences(
    row: Mapping[str, Any], columns: Sequence[str], edges: Mapping[str, Sequence[float]]
) -> str:
    """A sentence for each column that has a value; numbers in words where `edges` has the ends of their levels."""
    told = []
    for name in columns:
        value = row.get(name)
        if value is None or value == "":
            continue
        if name in ("fps", "source_fps"):
            # Of an image it is 0.
            told += [f"{value:.4g} fps."] if value else []
        else:
            told.append(f"{name.replace('_', ' ').capitalize()}: {_said(value, edges.get(name))}.")
    return " ".join(told)


def _said(value: Any, edges: Sequence[float] | None) -> str:
    if isinstance(value, float) and edges:
        return LEVELS[sum(value >= edge for edge in edges)]
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("_", " ")
