"""Laws of the page: its numbers are the table's, every row is counted once, it needs no network and trusts no name."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.captioning.spending import Usage
from data_prep.pipeline import ORDER, claimed, stages_of
from data_prep.report.account import account, rows_of, seconds_of
from data_prep.report.page import MOST_PICTURES, NEEDED, page
from data_prep.report.score_charts import thresholds
from data_prep.report.sheets import SIDE, Pictures, at_threshold
from data_prep.report.training import Training, training
from data_prep.report.work import Work
from data_prep.settings import parse
from data_prep.stage import Workspace
from data_prep.stages.report import STAGE, ReportConfig
from sora_train.data.decode.pool import DecodePool

SCORES = ("motion", "blur")
STAGES = (*ORDER[:-1], "report")


POOL: list[DecodePool] = []
"""The one that decodes the pictures of all tests."""


@pytest.fixture(scope="module", autouse=True)
def pool() -> Iterator[DecodePool]:
    with DecodePool(1, 60.0) as pool:
        POOL.append(pool)
        yield pool
        POOL.clear()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A folder with one clip file of a second."""
    out = tmp_path_factory.mktemp("out")
    path = out / "prep" / "files" / "clip.mp4"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height = 320, 160
        for number in range(8):
            picture = np.full((160, 320, 3), 30 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return Workspace(out)


def clip(source: str, workspace: Workspace, **columns: Any) -> dict[str, Any]:
    file = workspace.files / "clip.mp4"
    return {
        "key": f"{source}#0.000-1.000",
        "source": source,
        "kind": "video",
        "file": "clip.mp4",
        "bytes": file.stat().st_size,
        "frames": 8,
        "fps": 8.0,
        "width": 320,
        "height": 160,
        "duration": 1.0,
        "start": 0.0,
        "traits": "",
        "begin": 0.0,
        "end": 1.0,
        "source_duration": 3.0,
        "licence": "CC0",
        "motion": 0.3,
        "blur": 0.1,
        "camera": "static",
        "caption": "A caption.",
        "captions": json.dumps({"short": "Short."}),
        "caption_source": "given",
        "caption_version": "given",
        "caption_tokens": 0,
        "caption_cost": 0.0,
        "caption_contradicts": "",
        "duplicate_of": "",
        "duplicate_distance": None,
        "drop_stage": "",
        "drop_reason": "",
        "drop_detail": "",
    } | columns


def out_of(stage: str, reason: str, detail: str = "") -> dict[str, str]:
    return {"drop_stage": stage, "drop_reason": reason, "drop_detail": detail}


def html_of(rows: list[dict[str, Any]] | pa.Table, workspace: Workspace, **changed: Any) -> str:
    empty = pa.table({name: pa.array([], pa.string()) for name in ("drop_stage", "drop_reason")})
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows) if rows else empty
    known: dict[str, Any] = {
        "stages": STAGES,
        "filter_stage": "filter",
        "keep": "motion > 0.2 and blur < 0.5",
        "scores": SCORES,
        "work": [Work("probe", 4, 3.0)],
        "spent": Usage(),
        "training": Training([], {}, "no shards were written"),
        "experiment": "real_tiny",
        "title": "Preparation of out",
        "count": 6,
    }
    return page(table, Pictures(workspace, POOL[0], MOST_PICTURES), **(known | changed))


class Seen(HTMLParser):
    """The words of a page, its tags and their addresses."""

    def __init__(self, html: str):
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self._hidden = 0
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            v or "" for n, v in attrs if n in ("src", "href", "action", "data", "srcset")
        ]
        self._hidden += tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag == "style"

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.words.append(data)


@pytest.fixture(scope="module")
def rows(workspace: Workspace) -> list[dict[str, Any]]:
    """Four sources: one unreadable, one of three clips, one whose clip repeats another, one captioned later."""
    source = dict.fromkeys(clip("", workspace)) | {"kind": "video", "licence": "CC0"}
    return [
        source | {"key": "a.mp4"} | out_of("probe", "unreadable", "no header"),
        clip("b.mp4", workspace, key="b.mp4#0.000-1.000"),
        clip("b.mp4", workspace, key="b.mp4#1.000-2.000", motion=0.19)
        | out_of("filter", "motion > 0.2", "motion=0.19"),
        clip("b.mp4", workspace, key="b.mp4#2.000-3.000", file=None, duration=None, motion=None)
        | out_of("cut", "too_short", "0.1 s"),
        clip("c.mp4", workspace, duplicate_of="b.mp4#0.000-1.000", duplicate_distance=0.05)
        | out_of("dedup", "duplicate", "of b.mp4#0.000-1.000"),
        clip("d.mp4", workspace, caption=None, captions=None)
        | out_of("caption", "caption_failed", "the endpoint cannot be reached"),
    ]


def test_the_numbers_of_the_page_are_the_tables(
    rows: list[dict[str, Any]], workspace: Workspace
) -> None:
    text = Seen(html_of(rows, workspace, spent=Usage(70, 30, 0.25))).text
    for words in (
        "1 kept + 5 dropped = 6 rows",
        "4 sources",
        "4 clips cut",
        "1 clips kept",
        "sources 4 9.0 s",
        "probe 3 9.0 s 1 0.0 s",
        "cut 4 4.0 s 1 1.0 s",
        "filter 3 3.0 s 1 1.0 s",
        "dedup 2 2.0 s 1 1.0 s",
        "caption 1 1.0 s 1 1.0 s",
        "probe unreadable 1 0.0 s a.mp4 no header",
        "filter motion > 0.2 1 1.0 s b.mp4#1.000-2.000 motion=0.19",
        "motion 4 clips",
        "motion > 0.2: at 0.18 it would keep 1 more (1.0 s), at 0.22 0 fewer (0.0 s)",
        "1 clips repeat another",
        "distance 0.05",
        "tokens spent in all, failed tries included 100",
        "money spent in all 0.25",
        "clips without a caption for now: failed 1",
        "CC0 1 1.0 s",
        "b.mp4 1 1.0 s 2",
        "probe 4 3.0 s 0.75",
        "short Short.",
    ):
        assert words in text, words


def test_the_histogram_counts_every_clip_that_came_to_the_filters(
    rows: list[dict[str, Any]], workspace: Workspace
) -> None:
    html = html_of(rows, workspace)
    found = re.findall(r"<title>[-\d.e]+ to [-\d.e]+: (\d+) kept, (\d+) dropped</title>", html)
    # Of motion and of blur: one clip is kept, three were dropped by then or later; a bar of both is drawn in two parts.
    assert sum(int(kept) for kept, _ in set(found)) >= 1
    assert html.count('stroke-dasharray="5 3"') == 2
    assert "motion &gt; 0.2" in html


names = st.sampled_from(["", *STAGES, "a stage of the user's"])
one_row = st.fixed_dictionaries(
    {
        "key": st.text(min_size=1, max_size=6),
        "source": st.none() | st.text(min_size=1, max_size=2),
        "drop_stage": names,
        "duration": st.none() | st.floats(0, 1e4),
        "begin": st.none() | st.floats(0, 1e4),
        "end": st.none() | st.floats(0, 1e4),
        "source_duration": st.none() | st.floats(0, 1e4),
    }
)


@given(st.lists(one_row, max_size=20))
def test_every_row_is_counted_once(rows: list[dict[str, Any]]) -> None:
    rows = [
        row | {"drop_reason": "r" if row["drop_stage"] else "", "drop_detail": ""} for row in rows
    ]
    told = account(rows, STAGES)
    assert told.kept.rows + told.dropped.rows == len(rows)
    assert sum(step.dropped.rows for step in told.steps) == told.dropped.rows
    assert sum(reason.share.rows for reason in told.reasons) == told.dropped.rows
    assert told.steps[-1].left.rows == told.kept.rows
    assert told.steps[-1].left.hours == pytest.approx(told.kept.hours)
    left = told.clips.rows
    for step in told.steps[STAGES.index("cut") + 1 :]:
        left -= step.dropped.rows
        assert step.left.rows == left
    assert told.kept.hours == pytest.approx(
        sum(seconds_of(row) for row in rows if not row["drop_reason"]) / 3600
    )


def test_nothing_is_fetched_from_anywhere(rows: list[dict[str, Any]], workspace: Workspace) -> None:
    html = html_of(rows, workspace)
    seen = Seen(html)
    assert seen.addresses and all(
        one.startswith("data:image/jpeg;base64,") for one in seen.addresses
    )
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(seen.tags)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r'src="data:[^"]*"', "", html))


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> {{ 7 * 7 }} \u202e"


def test_no_text_of_the_table_becomes_markup(workspace: Workspace) -> None:
    hostile = dict.fromkeys(
        (
            "licence",
            "caption",
            "camera",
            "caption_source",
            "caption_version",
            "caption_contradicts",
        ),
        HOSTILE,
    )
    named = {"captions": json.dumps({HOSTILE: HOSTILE, "fields": {"subject": HOSTILE}})}
    rows = [
        clip(HOSTILE, workspace, key=HOSTILE, **hostile, **named),
        clip(HOSTILE, workspace, key="b", duplicate_of=HOSTILE) | out_of("dedup", HOSTILE, HOSTILE),
        clip("c", workspace, motion=0.1) | out_of("filter", "motion > 0.2", HOSTILE),
    ]
    seen = Seen(html_of(rows, workspace, title=HOSTILE))
    assert "script" not in seen.tags
    assert all(one.startswith("data:image/jpeg") for one in seen.addresses)
    assert "49" not in seen.text.split() and "{{ 7 * 7 }}" in seen.text


@pytest.mark.parametrize("missing", [*NEEDED[1:], *SCORES])
def test_any_column_may_be_missing_or_null(
    rows: list[dict[str, Any]], workspace: Workspace, missing: str
) -> None:
    table = pa.Table.from_pylist(rows)
    number = table.schema.names.index(missing) if missing in table.schema.names else None
    if number is None:
        return
    null = pa.nulls(len(table), table.schema.field(missing).type)
    empty = pa.array([""] * len(table), pa.string()) if missing.startswith("drop_") else null
    assert "</html>" in html_of(table.set_column(number, missing, empty), workspace)
    if not missing.startswith("drop_"):
        assert "</html>" in html_of(table.remove_column(number), workspace)


def test_of_nothing_there_is_a_page_too(rows: list[dict[str, Any]], workspace: Workspace) -> None:
    table = pa.Table.from_pylist(rows)
    assert "0 kept + 0 dropped = 0 rows" in html_of(table.slice(0, 0), workspace)
    none_kept = html_of(rows[:1], workspace)
    assert "0 kept + 1 dropped = 1 rows" in none_kept
    assert "data:image" not in html_of(rows, workspace, count=0)


def test_thousands_of_clips_make_a_page_of_some_megabytes(
    rows: list[dict[str, Any]], workspace: Workspace
) -> None:
    one, other = rows[1], rows[2]
    many = [
        one | {"key": f"k{n}", "source": f"s{n % 500}", "motion": n / 1500} for n in range(3000)
    ]
    many += [other | {"key": f"d{n}", "motion": n / 20000} for n in range(3000)]
    html = html_of(many, workspace, count=24)
    assert len(html) < 5e6
    assert "3,000 kept + 3,000 dropped = 6,000 rows" in html
    assert html == html_of(many[::-1], workspace, count=24)


def test_a_clip_that_cannot_be_read_has_no_picture(workspace: Workspace, pool: DecodePool) -> None:
    gone = clip("a", workspace, file="gone.mp4")
    damaged = clip("b", workspace, file="damaged.mp4", bytes=4)
    (workspace.files / "damaged.mp4").write_bytes(b"oops")
    taken = Pictures(workspace, pool, 12).of([gone, damaged, clip("c", workspace)], 4)
    assert list(map(len, taken)) == [0, 0, 4]
    assert "no picture" in html_of([gone, damaged], workspace)


def test_pictures_are_small_and_no_more_than_asked_for(
    workspace: Workspace, pool: DecodePool
) -> None:
    row = clip("a", workspace)
    pictures = Pictures(workspace, pool, 4)
    ((one,),) = pictures.of([row])
    assert len(one) < 8000 and SIDE < 320
    # A picture that was taken is shown again, and the fifth is not taken.
    assert [len(three) for three in pictures.of([row, row], 3)] == [3, 3]
    assert pictures.of([row, row], 2) == [[], []]
    assert pictures.of([row]) == [[one]]


def test_an_image_is_shown_once(workspace: Workspace, pool: DecodePool) -> None:
    Image.new("RGB", (60, 30), (200, 0, 0)).save(workspace.files / "image.jpg")
    size = (workspace.files / "image.jpg").stat().st_size
    row = clip("a", workspace, kind="image", file="image.jpg", bytes=size, frames=1, fps=0.0)
    row |= {"width": 60, "height": 30, "duration": 0.0}
    ((one,),) = Pictures(workspace, pool, 9).of([row], 4)
    shown = Image.open(io.BytesIO(base64.b64decode(one.partition(",")[2])))
    assert shown.size == (60, 30)


@pytest.mark.parametrize(
    ("sign", "kept"),
    [("<", [4, 3, 2]), ("<=", [5, 4, 3, 2]), (">", [6, 7, 8]), (">=", [5, 6, 7, 8])],
)
def test_beside_a_threshold_stand_the_nearest_clips(
    workspace: Workspace, sign: str, kept: list[int]
) -> None:
    rows = [clip(str(n), workspace, motion=float(n)) for n in range(2, 9)]
    rows.append(clip("none", workspace, motion=None))
    (move,) = thresholds(f"motion {sign} 5", pa.Table.from_pylist(rows))
    passing, failing = at_threshold(rows, move)
    assert [row["motion"] for row in passing] == kept
    assert sorted(row["motion"] for row in [*passing, *failing]) == list(range(2, 9))


def test_filters_without_a_column_are_left_out(workspace: Workspace) -> None:
    table = pa.Table.from_pylist([clip("a", workspace)]).drop_columns(["blur"])
    (move,) = thresholds("motion > 0.2 and (blur < 0.5 or text_area < 1)", table)
    assert (move.column, move.threshold) == ("motion", 0.2)
    assert thresholds("", table) == [] == thresholds("blur < 1", table)


def test_buckets_that_cannot_be_told_are_a_sentence(tmp_path: Path) -> None:
    assert training(tmp_path, "real_tiny").problem
    (tmp_path / "manifest.parquet").write_bytes(b"no manifest")
    assert training(tmp_path, "real_tiny").problem
    html = html_of([], Workspace(tmp_path), training=Training([], {}, "no shards were written"))
    assert "Not told: no shards were written." in html


def test_the_stage_writes_one_file_and_keeps_the_rows(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    settings = parse([f"input={tmp_path}", f"output={tmp_path / 'out'}"], stages_of())
    workspace = claimed(settings)
    table = pa.Table.from_pylist(rows)
    result = STAGE.run(table, ReportConfig(), workspace)
    assert len(result) == len(table)
    text = (workspace.out / "report.html").read_text()
    assert "1 kept + 5 dropped = 6 rows" in text
    assert [path.name for path in workspace.out.iterdir() if path.is_file()] == ["report.html"]
    STAGE.run(table, ReportConfig(), workspace)
    assert (workspace.out / "report.html").read_text() == text


def test_rows_without_a_column_have_null() -> None:
    assert rows_of(pa.table({"a": [1, 2]}), ["a", "b"]) == [
        {"a": 1, "b": None},
        {"a": 2, "b": None},
    ]
