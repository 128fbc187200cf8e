"""Tables of clips with their captions and scores: CSV, JSONL or Parquet."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from sora_train.base.text import NotText, printable, require_text
from sora_train.data.captions.rows import (
    CAPTION_COLUMNS,
    CAPTIONS,
    FILE_COLUMNS,
    NAMED,
    SCORE,
    SCORES,
    Row,
    csv_rows,
    folded,
    jsonl_rows,
    no_file_column,
    parquet_rows,
)
from sora_train.data.captions.texts import (
    Named,
    dumped,
    known_scores,
    text_or_fields,
    told,
    with_main,
)
from sora_train.errors import UserError

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": jsonl_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
}


@dataclass(frozen=True)
class Texts:
    """The manifest's columns of these names for a clip of a table; '' where it has no value.

    `fault` says why the row cannot be used, `lacks` why it has no main caption.
    """

    caption: str = ""
    captions: str = ""
    scores: str = ""
    fault: str = ""
    lacks: str = ""


@dataclass(frozen=True)
class Table:
    """The texts of clips by the names of their files, in order; and why the rows that name none do not, by place."""

    path: Path
    texts: dict[str, Texts] = field(default_factory=dict)
    nameless: dict[str, str] = field(default_factory=dict)


class BadValue(ValueError):
    """A value of a row is not what its column is for."""


def read_table(path: Path) -> Table:
    """The captions and scores of a table by file.

    The columns are `file` (or another of FILE_COLUMNS), `caption` (or text, prompt), `caption_NAME` for
    further captions and `score_NAME` for numbers. Columns `captions` and `scores` may hold an object
    of these instead. A row that cannot be used keeps its place, with the reason. Raises UserError
    with the place of what spoils the whole: no column of files, an open quote, a clip that is
    named twice, no row that can be used.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise UserError(
            f"{path} is not a captions table; give a .jsonl, .csv, .tsv or .parquet file"
        )
    table = Table(path)
    try:
        for row in READERS[suffix](path):
            _add(table, row)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as a {suffix[1:]} table: {error}") from error
    faults = [f"{place}: {fault}" for place, fault in table.nameless.items()]
    faults += [texts.fault for texts in table.texts.values()]
    if faults and all(faults):
        others = f" (and none of the {len(faults)} rows can be used)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{others}")
    return table


def _add(table: Table, row: Row) -> None:
    try:
        name = file_of(row)
    except BadValue as error:
        table.nameless[printable(row.where)] = printable(row.fault or str(error))
        return
    if name in table.texts:
        raise UserError(f"{row.where}: {name!r} was named before; keep one row for each clip")
    table.texts[name] = texts_of(row)


def file_of(row: Row) -> str:
    columns = {folded(column): value for column, value in row.values.items()}
    name = next((columns[column] for column in FILE_COLUMNS if columns.get(column)), None)
    if name is None:
        raise BadValue(no_file_column(row.values))
    if not isinstance(name, str):
        raise BadValue(f"the name of the clip is {told(name)}; write its path")
    try:
        return require_text(name, "the name of the clip")
    except NotText as error:
        raise BadValue(str(error)) from error


def texts_of(row: Row) -> Texts:
    """The texts of a row, or its fault."""
    if row.fault:
        return Texts(fault=printable(f"{row.where}: {row.fault}"))
    try:
        caption, lacks = _main(row)
        main, captions = with_main(caption, _captions(row))
        scores = dumped(_scores(row))
    except (BadValue, NotText) as error:
        return Texts(fault=printable(f"{row.where}: {error}"))
    return Texts(main, captions, scores, lacks="" if main else printable(f"{row.where}: {lacks}"))


def _main(row: Row) -> tuple[str, str]:
    """The main caption, and what stands there where there is none. Raises BadValue and NotText."""
    found = {folded(column): value for column, value in row.values.items()}
    there = [(column, found[column]) for column in CAPTION_COLUMNS if column in found]
    for column, value in there:
        # Parquet and pandas write NaN for a missing text.
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            continue
        if not isinstance(value, str):
            raise BadValue(f"{column} is {told(value)}; write a text")
        return require_text(value, column).strip(), f"{column} is blank"
    if not there:
        return "", f"it has no caption, its columns are {', '.join(map(str, row.values))}"
    column, value = there[0]
    return "", f"{column} is {told(value) if value != '' else 'empty'}"


def _entries(row: Row, whole: str, prefix: str) -> dict[str, object]:
    """The values of the column `whole` and of the columns that begin with `prefix`, by name."""
    entries = row.values.get(whole) or {}
    if not isinstance(entries, Mapping):
        raise BadValue(
            f'{whole} is no object like {{"NAME": ...}} but {told(entries)}; write columns {prefix}NAME instead'
        )
    columns = {
        str(column).removeprefix(prefix): value
        for column, value in row.values.items()
        if str(column).startswith(prefix) and column != prefix
    }
    entries = {**entries, **columns}
    return {str(name): value for name, value in entries.items() if value not in (None, "")}


def _captions(row: Row) -> Named:
    named: Named = {}
    for name, value in _entries(row, CAPTIONS, NAMED).items():
        # Parquet writes NaN for a missing caption too.
        if isinstance(value, float) and math.isnan(value):
            continue
        caption = text_or_fields(value)
        if caption is None:
            raise BadValue(
                f"the caption {name!r} is neither a text nor an object of texts but {told(value)}"
            )
        if caption:
            named[require_text(name, "the name of a caption")] = caption
    return named


def _scores(row: Row) -> dict[str, float]:
    scores: dict[str, float] = {}
    for name, value in _entries(row, SCORES, SCORE).items():
        try:
            score = known_scores({name: float(value) if isinstance(value, str) else value})
        except ValueError:
            score = {}
        # Parquet writes NaN for a missing score.
        is_missing = isinstance(value, float) and math.isnan(value)
        if not score and not is_missing:
            raise BadValue(f"the score {name!r} is not a number: {value!r}; correct or empty it")
        scores |= score
    return scores
