"""Some frames of a clip, evenly spread, for a model or a page to look at."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from data_prep.media.reading import BACKGROUND
from data_prep.stage import Workspace
from sora_train.data.decode.frames import DecodeRequest, decode_frames


def request_of(
    row: Mapping[str, Any], workspace: Workspace, count: int, longest: int
) -> DecodeRequest:
    """Asks for the middles of `count` equal parts of a clip, or for an image, at most `longest` pixels a side."""
    height, width = row["height"], row["width"]
    shrink = min(1.0, longest / max(height, width))
    duration = (row["duration"] or 0.0) if row["kind"] == "video" else 0.0
    count = min(count, max(1, row["frames"] or 1)) if row["kind"] == "video" else 1
    return DecodeRequest(
        row=0,
        key=row["key"] or "",
        path=str(workspace.files / row["file"]),
        offset=0,
        length=row["bytes"],
        kind=row["kind"] or "video",
        times=tuple(duration * (number + 0.5) / count for number in range(count)),
        crop=(0.0, 0.0, float(height), float(width)),
        shown=(height, width),
        height=max(1, round(height * shrink)),
        width=max(1, round(width * shrink)),
        start=row["start"] or 0.0,
        fps=row["fps"] or 0.0,
        traits=row["traits"] or "",
        alpha_background=BACKGROUND,
    )


def jpegs(
    row: Mapping[str, Any], workspace: Workspace, count: int, longest: int, quality: int
) -> list[bytes]:
    """These frames as JPEG. Raises BadClip where the file cannot be read."""
    frames = decode_frames(request_of(row, workspace, count, longest))
    return [jpeg(frame, quality) for frame in frames]


def jpeg(frame: np.ndarray, quality: int) -> bytes:
    """uint8 (H, W, 3) RGB as JPEG."""
    data = io.BytesIO()
    Image.fromarray(frame).save(data, format="JPEG", quality=quality, optimize=True)
    return data.getvalue()
