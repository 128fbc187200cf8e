"""Tables of clips with their captions and scores: CSV, JSONL or Parquet."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sora_train.data.captions.texts import Named, dumped, known_scores, text_or_fields, with_main
from sora_train.errors import UserError

TABLE_SUFFIXES = (".jsonl", ".csv", ".parquet")
FILE_COLUMNS = ("file", "path", "video", "file_name")
CAPTION_COLUMNS = ("caption", "text")
NAMED, SCORE = "caption_", "score_"


@dataclass(frozen=True)
class Texts:
    """The manifest's columns of these names for a clip of a table; '' where it has no value."""

    caption: str = ""
    captions: str = ""
    scores: str = ""


def read_table(path: Path) -> dict[str, Texts]:
    """File name -> captions and scores, in the table's order.

    The columns are `file` (or path, video, file_name), `caption` (or text), `caption_NAME` for
    further captions and `score_NAME` for numbers. Columns `captions` and `scores` may hold an object
    of these instead. Raises UserError with the file and line of a value that cannot be read, and of a
    clip that is named twice.
    """
    suffix = path.suffix.lower()
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if suffix not in readers:
        raise UserError(f"{path} is not a captions table; give a .jsonl, .csv or .parquet file")
    try:
        rows = readers[suffix](path)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as a {suffix[1:]} table: {error}") from error
    table: dict[str, Texts] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        name = next((row[column] for column in FILE_COLUMNS if row.get(column)), None)
        if not name:
            raise UserError(
                f"{where}: no column names the clip; one of {', '.join(FILE_COLUMNS)} is needed, "
                f"the columns are {', '.join(map(str, row)) or 'none'}"
            )
        if name in table:
            raise UserError(f"{where}: {name!r} was named before; keep one row for each clip")
        caption = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), "")
        main, captions = with_main(str(caption).strip(), _captions(row, where))
        table[str(name)] = Texts(main, captions, dumped(_scores(row, where)))
    return table


def _entries(row: Mapping[str, object], whole: str, prefix: str, where: str) -> dict[str, object]:
    """The values of the column `whole` and of the columns that begin with `prefix`, by name."""
    entries = row.get(whole) or {}
    if not isinstance(entries, Mapping):
        raise UserError(
            f'{where}: {whole} is no object like {{"NAME": ...}}; write columns {prefix}NAME instead'
        )
    columns = {
        str(column).removeprefix(prefix): value
        for column, value in row.items()
        if str(column).startswith(prefix) and column != prefix
    }
    entries = {**entries, **columns}
    return {str(name): value for name, value in entries.items() if value not in (None, "")}


def _captions(row: Mapping[str, object], where: str) -> Named:
    named: Named = {}
    for name, value in _entries(row, "captions", NAMED, where).items():
        caption = text_or_fields(value)
        if caption is None:
            raise UserError(
                f"{where}: the caption {name!r} is neither a text nor an object of texts: {value!r}"
            )
        if caption:
            named[name] = caption
    return named


def _scores(row: Mapping[str, object], where: str) -> dict[str, float]:
    scores: dict[str, float] = {}
    for name, value in _entries(row, "scores", SCORE, where).items():
        try:
            score = known_scores({name: float(value) if isinstance(value, str) else value})
        except ValueError:
            score = {}
        # Parquet writes NaN for a missing score.
        is_missing = isinstance(value, float) and math.isnan(value)
        if not score and not is_missing:
            raise UserError(
                f"{where}: the score {name!r} is not a number: {value!r}; correct or empty it"
            )
        scores |= score
    return scores


def _jsonl(path: Path) -> list[dict[str, object]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error.msg}); one object a line is needed"
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f'{path}, line {number}: an object like {{"file": ..., "caption": ...}} is needed'
            )
        rows.append(row)
    return rows


def _csv(path: Path) -> list[dict[str, object]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return [dict(row) for row in csv.DictReader(file)]


def _parquet(path: Path) -> list[dict[str, object]]:
    return pq.ParquetFile(path).read().to_pylist()
