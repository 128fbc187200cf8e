"""Frames of a clip as JPEG, for a model or a page to look at."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from data_prep.media.reading import frames_between, open_clip, small_picture
from data_prep.stage import Workspace

QUALITY = 85


def jpegs(
    row: Mapping[str, Any], workspace: Workspace, count: int, longest: int, quality: int = QUALITY
) -> list[bytes]:
    """Up to `count` frames of a clip, evenly spread, as JPEG of at most `longest` pixels a side.

    Raises BadClip where the file cannot be read.
    """
    return [_jpeg(one, quality) for one in pictures(row, workspace, count, longest)]


def pictures(
    row: Mapping[str, Any], workspace: Workspace, count: int, longest: int
) -> list[Image.Image]:
    """The middle frames of `count` equal parts of a clip; one of an image."""
    duration = (row["duration"] or 0.0) if row["kind"] == "video" else 0.0
    count = min(count, max(1, row["frames"] or 1))
    shrink = min(1.0, longest / max(row["width"], row["height"], 1))
    size = max(1, round(row["height"] * shrink)), max(1, round(row["width"] * shrink))
    found = []
    for number in range(count):
        begin = duration * (number + 0.5) / count if duration else 0.0
        with open_clip(row, workspace) as file:
            frames = frames_between(
                file,
                # The frame that is shown at this time has begun before it.
                max(0.0, begin - 1 / (row["fps"] or 25.0)),
                duration + 1.0,
                row["traits"] or "",
                row["start"] or 0.0,
                row["fps"] or 0.0,
                is_seekable=row["kind"] == "video",
            )
            for _, _, frame in frames:
                found.append(Image.fromarray(small_picture(frame, *size)))
                break
    return found


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    data = io.BytesIO()
    picture.save(data, format="JPEG", quality=quality)
    return data.getvalue()
