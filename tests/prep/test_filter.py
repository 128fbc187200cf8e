"""Filters: conditions mean what Python means by them, drop with their reason, and say what a moved threshold does."""

import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.expressions import conditions
from data_prep.settings import parse
from data_prep.stage import DROPS, Workspace
from data_prep.stages.filter import DEFAULT, STAGE, FilterConfig
from data_prep.stages.filter import filter as run_filter
from data_prep.thresholds import moved
from sora_train.errors import ConfigError
from tests.sentences import refuses

NUMBERS, TEXTS = ("a", "b", "n"), ("s", "t")
SCHEMA = pa.schema(
    [
        ("a", pa.float64()),
        ("b", pa.float32()),
        ("n", pa.int64()),
        ("s", pa.string()),
        ("t", pa.string()),
        ("duration", pa.float64()),
        ("kind", pa.string()),
        ("boxes", pa.list_(pa.int64())),
        ("vfr", pa.bool_()),
    ]
)
numbers = st.sampled_from([-2.0, -1.0, -0.25, 0.0, 0.5, 1.0, 3.0, 1e6])
literal = numbers.map(repr) | st.integers(-3, 3).map(str)
text = st.sampled_from(["pan", "shake", "é", ""]).map(repr)
number_text = st.recursive(
    literal | st.sampled_from(NUMBERS),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(
            lambda p: f"{p[0]}({p[1]}, {p[2]})"
        ),
        inner.map(lambda p: f"abs({p})"),
        inner.map(lambda p: f"(-{p})"),
    ),
    max_leaves=4,
)
signs = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
text_term = text | st.sampled_from(TEXTS)
comparison = st.one_of(
    st.tuples(number_text, signs, number_text).map(" ".join),
    st.tuples(number_text, signs, number_text, signs, number_text).map(" ".join),
    st.tuples(text_term, signs, text_term).map(" ".join),
    st.tuples(st.sampled_from(TEXTS), st.sampled_from(["in", "not in"]), st.lists(text)).map(
        lambda p: f"{p[0]} {p[1]} [{', '.join(p[2])}]"
    ),
    st.tuples(st.sampled_from(NUMBERS), st.sampled_from(["in", "not in"]), st.lists(literal)).map(
        lambda p: f"{p[0]} {p[1]} [{', '.join(p[2])}]"
    ),
    st.sampled_from(["vfr", "vfr == True", "vfr != False"]),
)
condition_text = st.recursive(
    comparison,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
            lambda p: f"({p[0]}) {p[1]} ({p[2]})"
        ),
        inner.map(lambda p: f"not ({p})"),
    ),
    max_leaves=5,
)
rows_of_values = st.lists(
    st.fixed_dictionaries(
        {
            "a": numbers,
            "b": numbers,
            "n": st.integers(-3, 3),
            "s": st.sampled_from(["pan", "shake", "é", ""]),
            "t": st.sampled_from(["pan", "shake", "é", ""]),
            "duration": st.sampled_from([2.0, 7.5]),
            "kind": st.just("video"),
            "boxes": st.just([1]),
            "vfr": st.booleans(),
        }
    ),
    min_size=1,
    max_size=6,
)


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    drops = dict.fromkeys(DROPS.names, "")
    schema = pa.unify_schemas([SCHEMA, DROPS])
    return pa.Table.from_pylist([drops | row for row in rows], schema=schema)


def filtered(keep: str, rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    found = run_filter(table_of(rows), FilterConfig(keep=keep), Workspace.__new__(Workspace))
    return list(
        zip(found["drop_reason"].to_pylist(), found["drop_detail"].to_pylist(), strict=True)
    )


def row(**values: Any) -> dict[str, Any]:
    return {"kind": "video", "duration": 3600.0} | values


@settings(max_examples=150, deadline=None)
@given(condition_text, rows_of_values)
def test_a_condition_means_what_python_means(keep: str, rows: list[dict[str, Any]]) -> None:
    try:
        wanted = [bool(eval(keep, {"__builtins__": {}, **CALLS}, row)) for row in rows]
    except (ZeroDivisionError, OverflowError):
        return
    assert [not reason for reason, _ in filtered(keep, rows)] == wanted


CALLS = {"min": min, "max": max, "abs": abs}


@settings(max_examples=100, deadline=None)
@given(condition_text, rows_of_values, st.sampled_from([*NUMBERS, *TEXTS, "vfr"]))
def test_what_is_unknown_drops_no_clip_that_a_value_would_keep(
    keep: str, rows: list[dict[str, Any]], column: str
) -> None:
    """Kleene's logic: a clip without a score is dropped only where it would be whatever that were."""
    verdicts = filtered(keep, [{**one, column: None} for one in rows] + rows)
    for (reason, _), (with_value, _) in zip(verdicts, verdicts[len(rows) :], strict=False):
        assert with_value or not reason


def test_a_comparison_with_a_missing_value_keeps() -> None:
    rows = [row(a=None), row(a=math.nan), row(a=0.5), row(a=5.0)]
    for keep in ("a < 1", "not a >= 1", "a + 1 < 2", "a in (0.5, 0.75)", "abs(a) < 1"):
        assert [reason for reason, _ in filtered(keep, rows)] == ["", "", "", keep]
    known = [row(a=0.0, b=0.0)]
    assert filtered("max(a, b) > 1", [row(a=0.0), *known])[0][0] == ""
    assert filtered("not (a > 1 or b > 2)", [row(a=5.0), *known])[0][0] != ""
    assert [r for r, _ in filtered("a < 1 and b > 2", [row(a=3.0), row(b=3.0)])] == ["a < 1", ""]
    assert [r for r, _ in filtered("a > 1 or b > 2", [row(a=0.0), row(a=0.0, b=1.0)])] == [
        "",
        "a > 1 or b > 2",
    ]


def test_the_first_part_that_fails_is_the_reason_and_its_values_the_detail() -> None:
    rows = [
        row(a=0.003, s="pan", b=0.0),
        row(a=0.5, s="shake", b=1.0),
        row(a=0.5, s="pan", b=0.25),
        row(a=0.0, s="pan", drop_stage="clip", drop_reason="unreadable", drop_detail="x"),
    ]
    assert filtered("a > 0.02 and (s != 'shake' and (b < 0.2 or a < b))", rows) == [
        ("a > 0.02", "a=0.003"),
        ("s != 'shake'", "s=shake"),
        ("b < 0.2 or a < b", "b=0.25, a=0.5"),
        ("", ""),
    ]
    assert filtered("", rows) == [("", "")] * 4
    assert filtered("0.1 < a < 0.9", rows)[0] == ("0.1 < a < 0.9", "a=0.003")


@pytest.mark.parametrize(
    ("keep", "facts"),
    [
        ("motion >", ["filter.keep=motion >"]),
        ("a > 1 b", ["cannot be read", "b"]),
        ("__import__('os')", ["__import__('os')", "is not what"]),
        ("a.b > 1", ["a.b"]),
        ("a[0] > 1", ["a[0]"]),
        ("(lambda: 1) < 2", ["lambda"]),
        ("a ** 9 > 1", ["a ** 9"]),
        ("abs(a, b) > 1", ["2 values", "abs takes one"]),
        ("max(a) > 1", ["1 values", "two"]),
        ("max(a, key=b) > 1", ["is not what"]),
        ("s in ('a')", ["needs a list"]),
        ("s in t", ["needs a list"]),
        ("s in ('a', 1)", ["only texts or only numbers"]),
        ("a is 1", ["write =="]),
        ("a > 1j", ["1j"]),
        ("a == None", ["None"]),
        (f"a > {'9' * 400}", ["too large"]),
        ("(" * 500 + "a" + ")" * 500, ["cannot be read"]),
        ("not " * 20000 + "a", ["cannot be read"]),
        ("a > 1\0", ["cannot be read"]),
        ("x := 1", ["cannot be read"]),
        ("f'{a}' == 'x'", ["is not what"]),
    ],
)
def test_what_is_no_condition_is_refused_with_its_place(keep: str, facts: list[str]) -> None:
    with refuses(ConfigError, "filter.keep", *facts):
        FilterConfig(keep=keep)


@pytest.mark.parametrize(
    ("keep", "facts"),
    [
        ("durations > 1", ["durations", "did you mean duration?"]),
        ("a > 1 and zzz > 1", ["zzz", "columns:", "boxes"]),
        ("a > 'x'", ["compares a number with a text"]),
        ("s < 3", ["compares a text with a number"]),
        ("a and b > 1", ["'a'", "is a number"]),
        ("a", ["is a number where a condition is meant"]),
        ("not s", ["is a text where true or false is needed"]),
        ("s + 1 > 2", ["is a text where a number is needed"]),
        ("s in (1, 2)", ["is looked for among"]),
        ("boxes > 1", ["boxes", "list"]),
        ("vfr < True", ["compares"]),
        ("a > 1 and n < 3", ["'n' is null for all 1 videos", "section score"]),
    ],
)
def test_columns_and_kinds_are_checked(keep: str, facts: list[str]) -> None:
    with refuses(ConfigError, "filter.keep", *facts):
        filtered(keep, [row(a=1.0, b=1.0, s="x", t="y", vfr=True, boxes=[1])])


def test_a_score_that_images_do_not_have_is_no_mistake() -> None:
    assert filtered("a > 1", [row(kind="image"), row(kind="image")]) == [("", "")] * 2
    assert filtered("a > 1", [row(kind="image"), row(a=0.0)])[1][0] == "a > 1"


def test_the_default_keeps_what_has_no_score_and_drops_black_and_frozen() -> None:
    names = [condition.columns[0] for condition in conditions(DEFAULT, "filter.keep")]
    rows = table_of([row(), row(), row()])
    for name in names:
        rows = rows.append_column(name, pa.array([None, 0.1, 0.9], pa.float64()))
    found = run_filter(rows, FilterConfig(), Workspace.__new__(Workspace))
    assert found["drop_reason"].to_pylist() == ["", "", f"{names[0]} < 0.5"]


def test_the_command_line_gives_the_text_as_written() -> None:
    given = parse(
        ["input=a", "output=b", "filter.keep=text_area < 0.05 and motion > 0.02"], [STAGE]
    )
    assert given.filter.keep == "text_area < 0.05 and motion > 0.02"  # type: ignore[attr-defined]
    with refuses(ConfigError, "filter.keep", "open("):
        parse(["input=a", "output=b", "filter.keep=open(a) > 1"], [STAGE])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(NUMBERS),
            st.sampled_from(["<", "<=", ">", ">="]),
            st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0, 2.0]),
            st.booleans(),
        ),
        min_size=1,
        max_size=3,
    ),
    st.lists(
        st.fixed_dictionaries(
            {name: st.none() | st.integers(-44, 44).map(lambda v: v / 20) for name in "ab"}
            | {"n": st.integers(-3, 3), "duration": st.sampled_from([60.0, 3600.0])}
        ),
        min_size=1,
        max_size=12,
    ),
)
def test_a_moved_threshold_wins_and_loses_what_filtering_anew_does(
    filters: list[tuple[str, str, float, bool]], values: list[dict[str, Any]]
) -> None:
    turned = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
    rows = [row(**value) | {"kind": "image"} for value in values]

    def written(filters: list[tuple[str, str, float, bool]]) -> str:
        return " and ".join(
            f"{number!r} {turned[sign]} {column}" if swapped else f"{column} {sign} {number!r}"
            for column, sign, number, swapped in filters
        )

    def kept(filters: list[tuple[str, str, float, bool]]) -> set[int]:
        return {n for n, (reason, _) in enumerate(filtered(written(filters), rows)) if not reason}

    def hours(numbers: set[int]) -> float:
        return sum(rows[n]["duration"] for n in numbers) / 3600

    now = kept(filters)
    found = moved(written(filters), table_of(rows))
    assert len(found) == len(filters)
    for place, (told, (column, sign, number, swapped)) in enumerate(
        zip(found, filters, strict=True)
    ):
        known = [r[column] for r in rows if r[column] is not None]
        by = 0.1 * (abs(number) or (max(known) - min(known) if known else 0.0))
        by = by if sign in ("<", "<=") else -by
        for new, count, told_hours in (
            (number + by, told.won, told.won_hours),
            (number - by, told.lost, told.lost_hours),
        ):
            others = [*filters[:place], (column, sign, new, swapped), *filters[place + 1 :]]
            changed = kept(others) ^ now
            assert count == len(changed)
            assert told_hours == pytest.approx(hours(changed))
        assert (told.column, told.sign, told.threshold) == (column, sign, number)


def test_filters_of_other_forms_have_no_threshold_to_move() -> None:
    rows = table_of([row(a=1.0, b=1.0, s="x")])
    assert not moved("a < b and s != 'x' and (a > 1 or b > 1) and a + 1 > 2 and a == 1", rows)
