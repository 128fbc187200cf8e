"""Tables and lists of sources: captions, licences and times beside each, and what else is said as its provenance."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from data_prep.sources.source import Source, file_source
from sora_train.data.captions.rows import CAPTION_COLUMNS, FILE_COLUMNS, Row, folded
from sora_train.data.captions.tables import READERS, BadValue, file_of, texts_of
from sora_train.data.captions.texts import dumped
from sora_train.data.index.walk import existing, plain
from sora_train.data.storage.remote import is_remote
from sora_train.errors import UserError

LICENCE_COLUMNS = ("licence", "license")
BEGIN_COLUMNS, END_COLUMNS = ("begin", "start"), ("end", "stop")
_KNOWN = {
    *FILE_COLUMNS,
    *CAPTION_COLUMNS,
    *LICENCE_COLUMNS,
    *BEGIN_COLUMNS,
    *END_COLUMNS,
    "captions",
    "scores",
}


def list_table(path: Path) -> list[Source]:
    """The sources of a CSV, JSONL or Parquet table; a file may be there more than once with times of its own.

    Raises UserError where the table cannot be read.
    """
    suffix = path.suffix.lower()
    try:
        return [_of_row(row, path.parent) for row in READERS[suffix](path)]
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as a {suffix[1:]} table: {error}") from error


def said_of(path: Path, root: Path) -> dict[str, tuple[str, str]]:
    """(licence, provenance) of the files below `root` that a table of captions names, by their names."""
    said = {}
    for row in READERS[path.suffix.lower()](path):
        try:
            name = plain(file_of(row), root)
        except BadValue:
            continue  # the listing tells of it
        said[name] = _said({folded(column): value for column, value in row.values.items()})
    return said


def _said(columns: Mapping[str, object]) -> tuple[str, str]:
    told = {name: str(value) for name, value in columns.items() if _is_told(name, value)}
    return _text(columns, LICENCE_COLUMNS), dumped(told)


def list_names(path: Path) -> list[Source]:
    """The sources of a text file with a path or address a line; lines that begin with `#` are left out."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [_named(name, path.parent) for name in names]


def _of_row(row: Row, root: Path) -> Source:
    try:
        source = _named(file_of(row), root)
    except BadValue as error:
        return Source(row.where, drop_reason="bad_row", drop_detail=row.fault or str(error))
    columns = {folded(name): value for name, value in row.values.items()}
    texts = texts_of(row)
    begin, begin_fault = _seconds(columns, BEGIN_COLUMNS)
    end, end_fault = _seconds(columns, END_COLUMNS)
    fault = texts.fault or begin_fault or end_fault
    if begin is not None and end is not None and begin >= end:
        fault = fault or f"its range {begin:g} to {end:g} s is empty"
    licence, provenance = _said(columns)
    is_part = begin is not None or end is not None
    if is_part:
        source = replace(
            source, key=f"{source.key}@{begin or 0:g}-{'' if end is None else f'{end:g}'}"
        )
    if fault and not source.drop_reason:
        source = replace(source, drop_reason="bad_row", drop_detail=f"{row.where}: {fault}")
    return replace(
        source,
        given_caption=texts.caption,
        given_captions=texts.captions,
        licence=licence,
        provenance=provenance,
        range_begin=begin,
        range_end=end,
    )


def _named(name: str, root: Path) -> Source:
    """The source that a table calls `name`: an address, or a path relative to the table."""
    if is_remote(name):
        return file_source(name, name)
    return file_source(name, str(root / (existing(root, name) or name)))


def _is_told(name: str, value: object) -> bool:
    is_ours = name in _KNOWN or name.startswith(("caption_", "score_"))
    return not is_ours and value not in (None, "")


def _text(columns: Mapping[str, object], names: tuple[str, ...]) -> str:
    return next((str(columns[name]) for name in names if columns.get(name)), "")


def _seconds(columns: Mapping[str, object], names: tuple[str, ...]) -> tuple[float | None, str]:
    """The seconds of the first of these columns that has a value, and what is wrong with it."""
    for name in names:
        value = columns.get(name)
        if value in (None, ""):
            continue
        try:
            seconds = float(str(value))
        except ValueError:
            return None, f"{name} is {value!r}; write seconds, such as 12.5"
        return (
            (seconds, "")
            if seconds >= 0
            else (None, f"{name} is {seconds:g}, before the beginning")
        )
    return None, ""
