"""A file taken through the stage `score`, as a row of a clip is."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.footage import Shot, footage, write_footage
from data_prep.calls import checked
from data_prep.media.made import columns_of
from data_prep.stage import Workspace
from data_prep.stages.score import STAGE, ScoreConfig
from sora_train.data.decode.video_io import encode_h264

OFF = {name: False for name, field in ScoreConfig.model_fields.items() if field.annotation is bool}


def only(*names: str, **others: Any) -> ScoreConfig:
    """Settings with these scores alone."""
    return ScoreConfig(**OFF | dict.fromkeys(names, True) | others)


def row_of(path: Path, kind: str = "video", caption: str = "") -> dict[str, Any]:
    files = path.parent
    made = columns_of(files, path.name, kind)
    return made | {"key": path.name, "source_kind": kind, "given_caption": caption}


def scored(path: Path, settings: ScoreConfig, **row: Any) -> dict[str, Any]:
    """The scores of a file; its folder stands for `workspace.files`."""
    rows = pa.Table.from_pylist([row_of(path, **row)])
    workspace = _Files(path.parent.parent, files_folder=path.parent)
    return checked(STAGE, rows, STAGE.run(rows, settings, workspace)).to_pylist()[0]


def filmed(
    path: Path, shot: Shot, settings: ScoreConfig, crf: int = 20, **film: Any
) -> dict[str, Any]:
    return scored(write_footage(footage([shot], **film), path, crf=crf), settings)


def played(
    path: Path, frames: np.ndarray, settings: ScoreConfig, fps: float = 24.0
) -> dict[str, Any]:
    """The scores of frames, uint8 (T, H, W, 3)."""
    encode_h264(frames, fps, path)
    return scored(path, settings)


@dataclasses.dataclass(frozen=True)
class _Files(Workspace):
    files_folder: Path = Path()

    @property
    def files(self) -> Path:
        return self.files_folder
