"""The rows of a table of any kind, each with its place in the file, and why some cannot be trusted."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sora_train.base.text import NotText, decode_lines, decode_text
from sora_train.errors import UserError

FILE_COLUMNS = (
    "file",
    "path",
    "video",
    "file_name",
    "filename",
    "file_path",
    "video_path",
    "image",
    "image_path",
)
CAPTION_COLUMNS = ("caption", "text", "prompt")
CAPTIONS, SCORES = "captions", "scores"
"""Columns that hold an object of further captions, and of scores."""
NAMED, SCORE = "caption_", "score_"
"""How the columns of one of them begin."""
_DELIMITERS = ",\t;|"


@dataclass(frozen=True)
class Row:
    """A row's values by column, where it stands, and why its texts cannot be trusted."""

    where: str
    values: Mapping[str, object] = field(default_factory=dict)
    fault: str = ""


def folded(column: object) -> str:
    """A column's name as it is compared."""
    return str(column).strip().casefold()


def jsonl_rows(path: Path) -> Iterator[Row]:
    """The objects of a file with one a line. A line ends at a newline only: U+2028 may stand in JSON as it is."""
    text, faults = decode_lines(path.read_bytes(), str(path))
    row = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row += 1
        where, fault = f"{path}, line {number}, row {row}", faults.get(number, "")
        try:
            values = json.loads(line, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            said = getattr(error, "msg", str(error))
            yield Row(
                f"{path}, line {number}",
                {},
                fault or f"not JSON ({said}); one object a line is needed",
            )
            continue
        if isinstance(values, dict):
            yield Row(where, values, fault)
        else:
            yield Row(where, {}, 'an object like {"file": ..., "caption": ...} is needed')


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of JSON whose keys stand once; of two captions neither is the right one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"one of the keys {', '.join(key for key, _ in pairs)} stands twice")
    return found


def csv_rows(path: Path) -> Iterator[Row]:
    """The rows of a CSV file, whose header says what separates them: a comma, semicolon, tab or bar.

    Raises UserError with the line of a quote that is not closed: after it no row can be told from text.
    """
    text, faults = decode_lines(path.read_bytes(), str(path))
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=_delimiter(text), strict=True)
    header: list[str] = []
    row = 0
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {first}: a quote is not closed, or one inside a text is not written twice "
                f"({error}); correct the line, no row after it can be told apart"
            ) from error
        if cells is None:
            return
        if not cells:
            continue
        fault = next((faults[at] for at in range(first, reader.line_num + 1) if at in faults), "")
        if not header and fault:
            raise UserError(f"{path}, line {first}: {fault}; save it as UTF-8")
        if not header:
            header = _header(path, cells)
            continue
        if len(cells) != len(header):
            fault = fault or (
                f"{len(cells)} cells where the header has {len(header)}; put a text that holds "
                f"{reader.dialect.delimiter!r} into quotes"
            )
        row += 1
        where = f"{path}, line {first}, row {row}"
        yield Row(where, dict(zip(header, cells, strict=False)), fault)


def _delimiter(text: str) -> str:
    """What separates the columns: that by which the first line names a clip and a caption."""
    first = next((line for line in io.StringIO(text) if line.strip()), "")

    def known(delimiter: str) -> int:
        names = {folded(name.strip().strip('"')) for name in first.split(delimiter)}
        return sum(not names.isdisjoint(columns) for columns in (FILE_COLUMNS, CAPTION_COLUMNS))

    return max(_DELIMITERS, key=known)


def _header(path: Path, names: Sequence[str]) -> list[str]:
    twice = [name for name in names if name and names.count(name) > 1]
    _require_file_column(path, names)
    if twice:
        raise UserError(f"{path}: the column {twice[0]!r} stands twice; name each column once")
    return list(names)


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, of which only the columns of names, captions and scores are read.

    Raises UserError on the files of the datasets library that hold the clips themselves.
    """
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    for column in schema:
        is_struct = folded(column.name) in FILE_COLUMNS and pa.types.is_struct(column.type)
        if is_struct and {"bytes", "path"} <= {part.name for part in column.type}:
            raise UserError(
                f"{path} is a Parquet file of the datasets library: its column {column.name!r} holds the bytes of "
                "the clips; write each row's bytes to a file of its own, and name the files with their captions "
                "in a captions.jsonl"
            )
    _require_file_column(path, schema.names)
    table = file.read(columns=[name for name in schema.names if _is_known(name)])
    values = {name: _values(table.column(name)) for name in table.column_names}
    for number in range(len(table)):
        row = {name: column[number] for name, column in values.items()}
        fault = ""
        for name, value in row.items():
            if isinstance(value, bytes):
                try:
                    row[name] = decode_text(value, f"the column {name!r}")
                except NotText as error:
                    row[name], fault = None, str(error)
        yield Row(f"{path}, row {number + 1}", row, fault)


def names_clips(path: Path) -> bool:
    """Whether the columns of a table are a clip's name and its caption."""
    try:
        columns = {folded(column) for column in _columns(path)}
    except (OSError, ValueError, NotText, csv.Error, pa.ArrowException):
        return False
    return not (columns.isdisjoint(FILE_COLUMNS) or columns.isdisjoint(CAPTION_COLUMNS))


def _columns(path: Path) -> Iterable[object]:
    if path.suffix.lower() == ".parquet":
        return pq.ParquetFile(path).schema_arrow.names
    text, _ = decode_lines(path.read_bytes(), str(path))
    first = next((line for line in text.split("\n") if line.strip()), "")
    if path.suffix.lower() == ".jsonl":
        return next(jsonl_rows(path)).values if first else ()
    return next(csv.reader([first], delimiter=_delimiter(text)))


def _is_known(column: str) -> bool:
    return (
        folded(column) in (*FILE_COLUMNS, *CAPTION_COLUMNS)
        or column in (CAPTIONS, SCORES)
        or column.startswith((NAMED, SCORE))
    )


def _values(column: pa.ChunkedArray) -> list[object]:
    """The values of a column; texts as bytes where one of them is no UTF-8, which Parquet does not check."""
    try:
        values: list[object] = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
    return values


def _require_file_column(path: Path, columns: Sequence[str]) -> None:
    if {folded(column) for column in columns}.isdisjoint(FILE_COLUMNS):
        raise UserError(f"{path}: {no_file_column(columns)}")


def no_file_column(columns: Iterable[object]) -> str:
    """What is said of columns, or the keys of an object, none of which names the clip."""
    return (
        f"no column names the clip; one of {', '.join(FILE_COLUMNS)} is needed, "
        f"the columns are {', '.join(map(str, columns)) or 'none'}"
    )
