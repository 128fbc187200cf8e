"""Copies of a clip as they are met: encoded worse, scaled, cropped, with bars, mirrored, faster, slower, cut anew."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.footage import Shot, footage
from data_prep.dedup.volume import SIDE, TIMES
from data_prep.media.made import columns_of
from data_prep.stage import Workspace
from data_prep.stages.fingerprint import STAGE, FingerprintConfig
from sora_train.data.decode.video_io import encode_h264

COPIES = (
    "encoded",
    "half",
    "larger",
    "cropped",
    "cropped_at_one_side",
    "letterboxed",
    "pillarboxed",
    "mirrored",
    "faster",
    "slower",
    "all_at_once",
)
MIRRORED = ("mirrored", "all_at_once")
MARGIN = 3
"""Frames by which the cuts of a copy may be found away from the original's."""


def frames_of(shot: Shot, **size: Any) -> np.ndarray:
    """uint8 (N, H, W, 3), with MARGIN frames more at either end than the clip has."""
    return np.stack(list(footage([shot], **size).frames()))


def copied(
    name: str, frames: np.ndarray, fps: float, draws: np.random.Generator
) -> tuple[np.ndarray, float, int]:
    """(frames, fps, crf) of a copy, which begins and ends up to MARGIN frames away."""
    begin, end = draws.integers(0, 2 * MARGIN + 1, 2).tolist()
    made = frames[begin : len(frames) - end]
    height, width = made.shape[1:3]
    crf, size = 28, (width, height)
    rate = {"faster": fps * 1.05, "slower": fps / 1.05, "all_at_once": fps * 1.05}.get(name, fps)
    if name in MIRRORED:
        made = made[:, :, ::-1]
    if name in ("cropped", "all_at_once"):
        down, across = round(0.08 * height), round(0.08 * width)
        made = made[:, down : height - down, across : width - across]
    if name == "cropped_at_one_side":
        made = made[:, :, round(0.1 * width) :]
    if name == "letterboxed":
        made = np.pad(made, ((0, 0), (height // 7, height // 7), (0, 0), (0, 0)))
    if name == "pillarboxed":
        made = np.pad(made, ((0, 0), (0, 0), (width // 8, width // 8), (0, 0)))
    if name in ("encoded", "all_at_once"):
        crf = 35
    share = {"half": 0.5, "larger": 1.5, "all_at_once": 0.7}.get(name, 1.0)
    size = (round(made.shape[2] * share / 2) * 2, round(made.shape[1] * share / 2) * 2)
    scaled = [np.asarray(Image.fromarray(frame).resize(size)) for frame in made]
    return np.stack(scaled), rate, crf


def original(frames: np.ndarray) -> np.ndarray:
    return frames[MARGIN : len(frames) - MARGIN]


def clip_row(
    workspace: Workspace, key: str, frames: np.ndarray, fps: float, crf: int = 18
) -> dict[str, Any]:
    """The columns of a clip whose file is written below `workspace.files`."""
    file = f"{key}.mp4"
    path = Path(workspace.files) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    encode_h264(frames, fps, path, crf)
    return row_of(workspace, key, file)


def row_of(workspace: Workspace, key: str, file: str, kind: str = "video") -> dict[str, Any]:
    made = columns_of(workspace.files, file, kind)
    bit_rate = int(made["bytes"] * 8 / made["duration"]) if made["duration"] else 0
    return {"key": key, "kind": kind, "bit_rate": bit_rate, **made}


def fingerprinted(workspace: Workspace, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = STAGE.run(pa.Table.from_pylist(list(rows)), FingerprintConfig(), workspace)
    return [row | told for row, told in zip(rows, found.to_pylist(), strict=True)]


def volume_in(row: dict[str, Any]) -> np.ndarray:
    """uint8 (TIMES, SIDE, SIDE) of a row's fingerprint."""
    return np.frombuffer(row["fingerprint"], np.uint8).reshape(TIMES, SIDE, SIDE)
