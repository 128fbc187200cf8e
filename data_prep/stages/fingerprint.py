"""A fingerprint of each clip by which copies of it are found, however they were encoded, scaled, cropped or sped up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field

from data_prep.dedup.volume import LOOKED_AT, detail_of, volume_of
from data_prep.media.reading import BACKGROUND, frames_between, open_clip, small_picture
from data_prep.stage import Stage, Workspace
from sora_train.config.sections.base import Section
from sora_train.data.decode import picture
from sora_train.data.decode.frames import blaming_the_clip


class FingerprintConfig(Section):
    """`fingerprint:`"""

    least_detail: float = Field(1.5, ge=0)
    """Clips whose pictures deviate less than this many gray levels from smooth slopes get no fingerprint: black ones
    and skies look like others of their kind, and count as duplicates only where their bytes are equal."""


def fingerprint(rows: pa.Table, settings: FingerprintConfig, workspace: Workspace) -> pa.Table:
    """`fingerprint`: the volume of `data_prep/dedup/volume.py` as bytes, null where there is too little in it."""
    found = []
    for row in rows.to_pylist():
        volume = volume_of(_pictures(row, workspace))
        detail = detail_of(volume)
        is_flat = detail < settings.least_detail
        found.append(
            {"fingerprint": None if is_flat else volume.tobytes(), "fingerprint_detail": detail}
        )
    return pa.Table.from_pylist(found, schema=STAGE.adds)


def _pictures(
    row: Mapping[str, Any], workspace: Workspace
) -> Iterator[tuple[float, float, np.ndarray]]:
    """What `volume_of` is made of: every frame, or one of an image."""
    with open_clip(row, workspace) as file:
        if row["kind"] == "image":
            with blaming_the_clip(file):
                image = picture.as_rgb(picture.open_picture(file), BACKGROUND)
                size = (LOOKED_AT, LOOKED_AT)
                yield 0.0, 1.0, np.asarray(image.resize(size, Image.Resampling.BOX))
            return
        length = row["duration"] or 1.0
        for time, shown, frame in frames_between(
            file, 0.0, length + 1, row["traits"], row["start"], row["fps"], is_seekable=True
        ):
            end = (time + shown) / length
            yield time / length, end, small_picture(frame, LOOKED_AT, LOOKED_AT)


STAGE = Stage(
    name="fingerprint",
    run=fingerprint,
    config=FingerprintConfig,
    reads=("digest", "kind"),
    adds=pa.schema([("fingerprint", pa.binary()), ("fingerprint_detail", pa.float64())]),
    seconds=lambda row, settings: 60.0 + 4.0 * (row["duration"] or 0.0),
)
