"""Tables that name clips and say what they show: CSV, JSONL or Parquet."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sora_train.errors import UserError

TABLE_SUFFIXES = (".jsonl", ".csv", ".parquet")
FILE_COLUMNS = ("file", "path", "video", "file_name")
CAPTION_COLUMNS = ("caption", "text")


def read_table(path: Path) -> dict[str, str]:
    """File name -> caption (empty where there is none), in the table's order.

    The columns are `file` (or path, video, file_name) and `caption` (or text). Raises UserError
    naming the file and line of what cannot be read, and a file that is named twice.
    """
    suffix = path.suffix.lower()
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if suffix not in readers:
        raise UserError(f"{path} is not a captions table; give a .jsonl, .csv or .parquet file")
    try:
        rows = readers[suffix](path)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as a {suffix[1:]} table: {error}") from error
    table: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        name = next((row[column] for column in FILE_COLUMNS if row.get(column)), None)
        if not name:
            raise UserError(
                f"{path}, row {number}: no column names the clip; one of {', '.join(FILE_COLUMNS)} is needed, "
                f"found {', '.join(map(str, row)) or 'nothing'}"
            )
        if name in table:
            raise UserError(
                f"{path}, row {number}: {name!r} was named before; keep one row for each clip"
            )
        caption = next((row[column] for column in CAPTION_COLUMNS if row.get(column)), "")
        table[str(name)] = str(caption).strip()
    return table


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
