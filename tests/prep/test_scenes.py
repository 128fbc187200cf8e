"""Scenes: the transitions of footage are those it was made with, whatever the camera does and however it is read."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from data_prep.stage import Workspace
from data_prep.stages.probe import ProbeConfig, probe
from data_prep.stages.scenes import ScenesConfig, scenes

SOURCE = {"kind": "video", "offset": 0, "range_begin": None, "range_end": None}


def parts_of(path: Path, part_seconds: float = 1e6) -> pa.Table:
    """The source as probed, a row for each part."""
    row = {"key": path.name, "path": str(path), "length": path.stat().st_size, **SOURCE}
    schema = pa.schema([("range_begin", pa.float64()), ("range_end", pa.float64())])
    rows = pa.table({name: [value] for name, value in row.items() if name not in schema.names})
    for field in schema:
        rows = rows.append_column(field.name, pa.nulls(1, field.type))
    found = probe(rows, ProbeConfig(part_seconds=part_seconds), Workspace(path.parent))
    rows = rows.take(found["of_row"])
    for name in found.column_names:
        rows = rows.append_column(name, found[name]) if name != "of_row" else rows
    return rows


def transitions_in(path: Path, part_seconds: float = 1e6, **settings: Any) -> list[dict[str, Any]]:
    parts = parts_of(path, part_seconds)
    found = scenes(parts, ScenesConfig(**settings), Workspace(path.parent))
    return [one for part in found["transitions"].to_pylist() for one in part]


def test_nasa_has_a_dissolve_and_a_cut_and_others_have_none(real_videos: Path):
    dissolve, cut = transitions_in(real_videos / "nasa.mp4")
    assert dissolve["kind"] == "dissolve" and cut["kind"] == "cut"
    assert 127 <= round(dissolve["begin"] * 25) < round(dissolve["end"] * 25) <= 151
    assert abs(round(cut["begin"] * 25) - 202) <= 2 and cut["begin"] == cut["end"]


@pytest.mark.parametrize("name", ["press.mp4", "hiker.mp4"])
def test_one_scene_has_no_transitions(real_videos: Path, name: str):
    assert transitions_in(real_videos / name) == []
