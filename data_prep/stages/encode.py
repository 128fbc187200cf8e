"""Smaller copies of the clips that are kept, each for a set of shards of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from data_prep.media.made import MADE, columns_of
from data_prep.media.reading import frames_between, open_clip, picture, resized
from data_prep.stage import Stage, Workspace
from sora_train.config.sections.base import Section
from sora_train.config.sections.data import IntList
from sora_train.data.decode.video_io import Encoding, stream_h264


class EncodeConfig(Section):
    """`encode:`"""

    short_sides: IntList = ()
    """Short sides of smaller copies, such as [480,256]; a clip that is no larger has none."""
    crf: int = Field(18, ge=0, le=51)
    """Quality of their H.264, lower is better."""
    gop: int = Field(16, ge=1)
    """Most frames between their key frames."""


def encode(rows: pa.Table, settings: EncodeConfig, workspace: Workspace) -> pa.Table:
    """The copies of each clip, by their short side; images have none."""
    variants = [
        [
            _copy(row, side, settings, workspace)
            for side in settings.short_sides
            if row["source_kind"] == "video" and side < min(row["height"], row["width"])
        ]
        for row in rows.to_pylist()
    ]
    return pa.table({"variants": pa.array(variants, STAGE.adds.field("variants").type)})


def _copy(
    row: Mapping[str, Any], side: int, settings: EncodeConfig, workspace: Workspace
) -> dict[str, Any]:
    scale = side / min(row["height"], row["width"])
    height, width = (round(length * scale / 2) * 2 for length in (row["height"], row["width"]))
    made_of = f"{row['digest']} {height}x{width} {settings.crf} {settings.gop}"
    name = hashlib.sha256(made_of.encode()).hexdigest()[:32]
    file = f"{name[:2]}/{name}.mp4"

    def frames() -> Iterator[tuple[float | None, np.ndarray]]:
        with open_clip(row, workspace) as clip:
            for time, _, frame in frames_between(
                clip, 0.0, np.inf, row["traits"], row["start"], row["fps"], is_seekable=True
            ):
                yield time if row["vfr"] else None, resized(picture(frame), height, width)

    stream_h264(frames(), row["fps"], workspace.files / file, Encoding(settings.crf, settings.gop))
    return {"short_side": side, **columns_of(workspace.files, file, "video")}


_VARIANT = pa.struct([("short_side", pa.int64()), *MADE.items()])
STAGE = Stage(
    name="encode",
    run=encode,
    config=EncodeConfig,
    reads=("digest",),
    adds=pa.schema([("variants", pa.list_(_VARIANT))]),
    seconds=lambda row, settings: 60.0 + 10.0 * len(settings.short_sides) * (row["duration"] or 0),
    is_on=lambda settings: bool(settings.short_sides),
)
