"""From the parts of a source and their transitions to its clips: each within one scene, of a length that is of use."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from pydantic import Field, model_validator

from data_prep.stage import KEY, OF_ROW, Stage, Workspace
from sora_train.config.sections.base import Section

TOO_SHORT = "too_short_scenes"
Row = Mapping[str, Any]
Times = tuple[float, float]


class CutConfig(Section):
    """`cut:`"""

    min_seconds: float = Field(2.0, gt=0)
    """Scenes shorter than this give no clip."""
    max_seconds: float = Field(60.0, gt=0)
    """Longer scenes are divided into clips of equal length."""
    margin_frames: int = Field(2, ge=0)
    """Frames left out beside a dissolve or fade, where it is hardly to be seen; a cut needs none."""

    @model_validator(mode="after")
    def _a_range(self) -> CutConfig:
        if self.max_seconds < 2 * self.min_seconds:
            raise ValueError(
                f"cut.max_seconds={self.max_seconds:g} must be at least twice cut.min_seconds={self.min_seconds:g}, "
                "so that a longer scene can be divided"
            )
        return self


def cut(rows: pa.Table, settings: CutConfig, workspace: Workspace) -> pa.Table:
    """A row for each clip. A source without a scene of use stays as one row, and so does what was dropped before."""
    sources: dict[tuple[Any, ...], list[tuple[int, Row]]] = {}
    for number, row in enumerate(rows.to_pylist()):
        if row["drop_reason"] or row["kind"] != "video":
            name: tuple[Any, ...] = (number,)
        else:
            name = tuple(row[n] for n in (KEY, "path", "offset", "range_begin", "range_end"))
        sources.setdefault(name, []).append((number, row))
    found: list[dict[str, Any]] = []
    for parts in sources.values():
        number, row = parts[0]
        if row["drop_reason"] or row["kind"] != "video":
            found.append(_whole(number, row))
        else:
            found += _clips(sorted(parts, key=lambda part: part[1]["part_begin"]), settings)
    return pa.Table.from_pylist(found, schema=_SCHEMA)


def _clips(parts: Sequence[tuple[int, Row]], settings: CutConfig) -> list[dict[str, Any]]:
    source, clips, longest = parts[0][1], list[dict[str, Any]](), 0.0
    for scene, (begin, end) in enumerate(scenes_of([row for _, row in parts], settings)):
        longest = max(longest, end - begin)
        for clip_begin, clip_end in divided(begin, end, source, settings):
            # The last part that begins before the clip does.
            number = [n for n, row in parts if row["part_begin"] <= clip_begin + 1e-6][-1]
            clips.append(
                _whole(number, source)
                | {
                    KEY: f"{source[KEY]}#{clip_begin:.3f}-{clip_end:.3f}",
                    "scene": scene,
                    "begin": clip_begin,
                    "end": clip_end,
                }
            )
    if clips:
        return clips
    detail = (
        f"its longest scene lasts {longest:.3g} s, and cut.min_seconds={settings.min_seconds:g}"
    )
    return [_whole(parts[0][0], source) | {"drop_reason": TOO_SHORT, "drop_detail": detail}]


def scenes_of(parts: Sequence[Row], settings: CutConfig) -> Iterator[Times]:
    """(begin, end) in seconds after the first frame of what lies between transitions, in order.

    Where a part is missing, since it could not be read, a scene ends before it and another begins behind it.
    """
    margin = settings.margin_frames / (parts[0]["source_fps"] or 25.0)
    begin = end = parts[0]["part_begin"]
    for part in parts:
        if part["part_begin"] > end + 1e-6:
            if end > begin:
                yield begin, end
            # A dissolve of the part before may reach over the missing one.
            begin = max(begin, part["part_begin"])
        for found in part["transitions"]:
            beside = 0.0 if found["kind"] == "cut" else margin
            if found["begin"] - beside > begin:
                yield begin, found["begin"] - beside
            begin = max(begin, found["end"] + beside)
        end = max(end, part["part_end"])
    if end > begin:
        yield begin, end


def divided(begin: float, end: float, source: Row, settings: CutConfig) -> Iterator[Times]:
    """The scene itself, or equal parts of it that are short enough; nothing where it is too short.

    A clip has the frames whose time is in [begin, end), so times between two frames are exact too; those of a source
    of constant rate are moved to the frame at hand.
    """
    fps = 0.0 if source["source_vfr"] else source["source_fps"]

    def on_frame(time: float) -> float:
        return math.ceil(time * fps - 0.25) / fps if fps else time

    begin, end = on_frame(begin), on_frame(end)
    # A frame's time is rounded by its container.
    if end - begin < settings.min_seconds - 1e-3:
        return
    count = max(1, math.ceil((end - begin) / settings.max_seconds - 1e-6))
    edges = [begin, *(on_frame(begin + (end - begin) * n / count) for n in range(1, count)), end]
    yield from zip(edges[:-1], edges[1:], strict=True)


def _whole(number: int, row: Row) -> dict[str, Any]:
    """A row that stays as it is: an image, or what was dropped."""
    return {
        KEY: row[KEY],
        "source": row[KEY],
        "scene": 0,
        "begin": row["part_begin"],
        "end": row["part_end"],
        "drop_reason": "",
        "drop_detail": "",
        OF_ROW: number,
    }


STAGE = Stage(
    name="cut",
    run=cut,
    config=CutConfig,
    whole=True,
    adds=pa.schema(
        [
            (KEY, pa.string()),
            ("source", pa.string()),
            ("scene", pa.int64()),
            ("begin", pa.float64()),
            ("end", pa.float64()),
        ]
    ),
)
_SCHEMA = pa.unify_schemas(
    [
        STAGE.adds,
        pa.schema(
            [("drop_reason", pa.string()), ("drop_detail", pa.string()), (OF_ROW, pa.int64())]
        ),
    ]
)
