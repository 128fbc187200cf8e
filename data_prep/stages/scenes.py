"""Where the scenes of a source begin and end: hard cuts, dissolves and fades with their times, part by part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import pyarrow as pa

from data_prep.media.reading import open_row
from data_prep.scenes import pyscenedetect, transnet
from data_prep.scenes.samples import rate_of, samples
from data_prep.scenes.signals import signals
from data_prep.scenes.transitions import Thresholds, reach, transitions
from data_prep.stage import Stage, Workspace

TRANSITION = pa.struct(
    [("begin", pa.float64()), ("end", pa.float64()), ("kind", pa.string()), ("score", pa.float64())]
)


class ScenesConfig(Thresholds):
    """`scenes:`"""

    detector: Literal["joined", "transnetv2", "difference", "pyscenedetect"] = "joined"
    """joined: the network TransNetV2 and differences of frames; each of them alone; pyscenedetect: cuts alone, without
    torch."""


def scenes(rows: pa.Table, settings: ScenesConfig, workspace: Workspace) -> pa.Table:
    """The transitions that begin in each row's part, in seconds after the source's first frame; images have none."""
    found = [
        transitions_of(row, settings) if row["source_kind"] == "video" else []
        for row in rows.to_pylist()
    ]
    return pa.table({"transitions": pa.array(found, STAGE.adds.field("transitions").type)})


def transitions_of(row: Mapping[str, Any], settings: ScenesConfig) -> list[dict[str, Any]]:
    """What lies around the part is read too, so that it has the transitions that the whole source has there."""
    rate = rate_of(row["source_fps"])
    around = reach(settings, rate)
    first = math.floor(row["part_begin"] * rate) - around
    last = math.ceil(row["part_end"] * rate) + around
    with open_row(row) as file:
        pictures = samples(
            file,
            row,
            first - transnet.BLOCK - transnet.CONTEXT,
            last + transnet.BLOCK + transnet.CONTEXT,
        )
        found = signals(pictures, settings.detector, last)

    def time(step: int) -> float:
        inside = step - found.first < len(found.time)
        return float(found.time[step - found.first]) if inside else row["source_duration"]

    return [
        {"begin": begin, "end": time(one.end), "kind": one.kind, "score": one.score}
        for one in transitions(found, settings, rate, settings.detector)
        if row["part_begin"] <= (begin := time(one.begin)) < row["part_end"]
    ]


def _seconds(row: Mapping[str, Any], settings: ScenesConfig) -> float:
    # A frame of 4K takes a tenth of a second to decode, TransNetV2 a twentieth, both more on a machine at work.
    return 120.0 + 0.5 * (row["part_end"] - row["part_begin"] + 20) * (row["source_fps"] or 25.0)


def _check(settings: ScenesConfig) -> None:
    if settings.detector in ("joined", "transnetv2"):
        transnet.package()
    if settings.detector == "pyscenedetect":
        pyscenedetect.package()


STAGE = Stage(
    name="scenes",
    run=scenes,
    config=ScenesConfig,
    reads=("source_digest", "source_kind", "part_begin", "part_end"),
    adds=pa.schema([("transitions", pa.list_(TRANSITION))]),
    seconds=_seconds,
    check=_check,
)
