"""Cutting: clips lie within scenes, are of the lengths asked for, begin and end on frames, and no source is lost."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import calls
from data_prep.ledger import Ledger
from data_prep.stage import DROPS, Workspace
from data_prep.stages import cut as stage
from data_prep.stages.cut import CutConfig
from data_prep.stages.scenes import TRANSITION
from sora_train.config.messages import validated
from sora_train.errors import ConfigError
from tests.sentences import refuses

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("kind", pa.string()),
        ("range_begin", pa.float64()),
        ("range_end", pa.float64()),
        ("source_fps", pa.float64()),
        ("source_vfr", pa.bool_()),
        ("part_begin", pa.float64()),
        ("part_end", pa.float64()),
        ("transitions", pa.list_(TRANSITION)),
        *DROPS,
    ]
)
FPS = 24.0
Found = tuple[float, float, str]


def part(begin: float, end: float, *found: Found, key: str = "a.mp4", **more: Any) -> dict:
    """A row of a part with the transitions that begin in it."""
    names = ("begin", "end", "kind")
    rows = [dict(zip(names, one, strict=True)) | {"score": 1.0} for one in found]
    return {
        **{"key": key, "path": f"/{key}", "offset": 0, "kind": "video"},
        **{"source_fps": FPS, "source_vfr": False, "part_begin": begin, "part_end": end},
        **dict.fromkeys(DROPS.names, ""),
        "transitions": rows,
        **more,
    }


def dropped(begin: float, end: float, key: str = "a.mp4") -> dict:
    drop = {"drop_stage": "scenes", "drop_reason": "unreadable", "drop_detail": "damaged"}
    return part(begin, end, key=key) | {"transitions": None} | drop


def cut(*rows: dict, **config: Any) -> list[dict[str, Any]]:
    """The rows after the stage, joined and checked as a run does."""
    table = pa.Table.from_pylist(list(rows), schema=SCHEMA)
    result = stage.cut(table, CutConfig(**config), Workspace(Path("unused")))
    result = calls.checked(stage.STAGE, table, result)
    return (
        Ledger(Path("unused"), stage.STAGE, CutConfig(**config)).joined(table, result).to_pylist()
    )


def times(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(row["begin"], row["end"]) for row in rows if not row["drop_reason"]]


def test_scenes_lie_between_transitions_and_a_margin_is_left_beside_what_is_gradual():
    rows = cut(
        part(0, 20, (5.0, 5.0, "cut"), (10.0, 11.0, "dissolve"), (15.0, 16.0, "fade")),
        margin_frames=6,
    )
    assert times(rows) == [(0, 5), (5, 9.75), (11.25, 14.75), (16.25, 20)]
    assert [row["scene"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["key"] == "a.mp4#5.000-9.750" and rows[1]["source"] == "a.mp4"


def test_a_scene_goes_on_over_the_edges_of_parts():
    assert times(cut(part(0, 10, (4.0, 4.0, "cut")), part(10, 20), part(20, 30))) == [
        (0, 4),
        (4, 30),
    ]


def test_a_long_scene_is_divided_on_frames():
    rows = cut(part(0, 100.0), max_seconds=30.0)
    assert times(rows) == [(0, 25), (25, 50), (50, 75), (75, 100)]
    assert {row["scene"] for row in rows} == {0}
    rows = cut(part(0, 61.0), max_seconds=20.0)
    assert all(begin * FPS == pytest.approx(round(begin * FPS)) for begin, _ in times(rows))


def test_a_source_without_a_scene_of_use_says_why():
    [row] = cut(part(0, 1.0))
    assert row["key"] == "a.mp4" and row["drop_stage"] == "cut"
    assert row["drop_reason"] == "too_short_scenes" and "lasts 1 s" in row["drop_detail"]
    [row] = cut(part(0, 4.0, (1.9, 1.9, "cut"), (3.0, 3.4, "fade")), part(4.0, 4.5))
    assert row["drop_reason"] == "too_short_scenes"


def test_a_part_that_was_dropped_stays_and_ends_the_scene_before_it():
    rows = cut(part(0, 10), dropped(10, 20), part(20, 30, (22.5, 22.5, "cut")))
    assert times(rows) == [(0, 10), (20, 22.5), (22.5, 30)]
    [lost] = [row for row in rows if row["drop_reason"]]
    assert (lost["drop_stage"], lost["drop_reason"], lost["key"]) == (
        "scenes",
        "unreadable",
        "a.mp4",
    )


def test_images_pass_and_ranges_of_one_file_are_sources_of_their_own():
    image = part(0, 0, key="b.png", kind="image")
    first = part(0, 10, range_begin=0.0, range_end=10.0)
    second = part(15, 25, range_begin=15.0, range_end=25.0)
    rows = cut(image, first, second)
    assert [row["key"] for row in rows] == ["b.png", "a.mp4#0.000-10.000", "a.mp4#15.000-25.000"]


def test_times_of_a_variable_rate_stand_as_they_are():
    found = ((3.0371, 3.0371, "cut"),)
    assert times(cut(part(0, 9.0123, *found, source_vfr=True))) == [
        (0, 3.0371),
        (3.0371, 9.0123),
    ]


def test_a_longest_clip_shorter_than_two_of_the_shortest_is_refused():
    with refuses(ConfigError, "cut.max_seconds=3", "cut.min_seconds=2"):
        validated(CutConfig, {"max_seconds": 3.0})


def test_a_dissolve_that_reaches_over_a_missing_part_is_in_no_clip():
    cuts = cut(
        part(0.0, 2.0, (1.5, 3.5, "dissolve")), dropped(2.0, 3.0), part(3.0, 8.0), margin_frames=0
    )
    assert times([row for row in cuts if not row["drop_reason"]]) == [(3.5, 8.0)]


@st.composite
def sources(draw: st.DrawFn) -> list[dict]:
    rows = []
    for number in range(draw(st.integers(1, 3))):
        key, frame = f"{number}.mp4", 0
        for _ in range(draw(st.integers(1, 4))):
            length = draw(st.integers(1, 4000))
            if draw(st.booleans()) and draw(st.booleans()):
                rows.append(dropped(frame / FPS, (frame + length) / FPS, key))
            else:
                begins = sorted(draw(st.sets(st.integers(frame, frame + length - 1), max_size=6)))
                found: list[Found] = []
                for begin in begins:
                    span = draw(st.sampled_from([0, 12, 40]))
                    kind = "dissolve" if span else "cut"
                    found.append((begin / FPS, (begin + span) / FPS, kind))
                rows.append(part(frame / FPS, (frame + length) / FPS, *found, key=key))
            frame += length
    return draw(st.permutations(rows))


@given(
    sources(), st.sampled_from([0, 2, 5]), st.sampled_from([(2.0, 60.0), (0.5, 7.0), (1.0, 2.0)])
)
@settings(max_examples=150, deadline=None)
def test_no_source_is_lost_and_clips_keep_their_bounds(
    rows: list[dict], margin: int, bounds: tuple[float, float]
):
    least, most = bounds
    cuts = cut(*rows, margin_frames=margin, min_seconds=least, max_seconds=most)
    assert {row["source"] for row in cuts} == {row["key"] for row in rows}
    lost = [row for row in rows if row["drop_reason"]]
    assert sum(row["drop_stage"] == "scenes" for row in cuts) == len(lost)
    clips = [row for row in cuts if not row["drop_reason"]]
    assert len({row["key"] for row in clips}) == len(clips)
    for source in {row["key"] for row in rows}:
        mine = sorted(times([row for row in clips if row["source"] == source]))
        assert all(a[1] <= b[0] + 1e-9 for a, b in zip(mine, mine[1:], strict=False))
        for begin, end in mine:
            assert least - 1 / FPS <= end - begin <= most + 1 / FPS
            for row in rows:
                if row["key"] != source:
                    continue
                if row["drop_reason"]:
                    assert end <= row["part_begin"] + 1e-9 or begin >= row["part_end"] - 1e-9
                for one in row["transitions"] or []:
                    inside = begin + 1e-6 < one["begin"] < end - 1e-6
                    over = one["begin"] < end - 1e-6 and one["end"] > begin + 1e-6
                    assert not inside and not (over and one["kind"] != "cut")
