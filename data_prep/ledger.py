"""What every stage has computed, as Parquet: the truth from which a run goes on, whichever engine wrote it.

The result of a row is kept under a digest of the stage (its code and settings) and of the columns that it reads, so
what a changed setting leaves as it was is not computed again. Each result is a file of its own the moment it is there;
`compact` joins small files. Readers leave out what is damaged: it is computed anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.stage import DROPS, OF_ROW, Stage
from sora_train.base.files import renamed_when_whole
from sora_train.config.sections.base import Section
from sora_train.errors import Fault

ADDRESS, SECONDS = "_address", "_seconds"
# Files of a stage from which on they are joined.
MANY_FILES = 200
Failures = Mapping[str, tuple[str, str]]
"""(reason, detail) by address, of rows that failed now and are tried again in the next run."""


class Unfinished(Exception):
    """Rows of a stage have no result yet: other parts are at work, or were cut off."""

    def __init__(self, stage: str, rows: int):
        super().__init__(f"{rows} rows have no result of the stage {stage}")
        self.stage, self.rows = stage, rows


class Ledger:
    """The results of one stage with its settings, in a folder of its own."""

    def __init__(self, root: Path, stage: Stage, settings: Section):
        self.stage = stage
        self.reads = tuple(dict.fromkeys((*stage.reads, *stage.reads_also(settings))))
        self.address = stage.address(settings)
        self.folder = root / stage.name / self.address
        self.schema = pa.unify_schemas([stage.adds, DROPS])

    def addresses(self, rows: pa.Table) -> list[str]:
        """Where the result of each row is kept: a digest of the columns that the stage reads."""
        null = pa.nulls(len(rows))
        names = rows.schema.names
        columns = [(rows[n] if n in names else null).to_pylist() for n in self.reads]
        return [
            hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()[:32]
            for values in (zip(*columns, strict=True) if columns else [()] * len(rows))
        ]

    def done(self) -> dict[str, float]:
        """The addresses that have a result, each with the seconds it took."""
        found: dict[str, float] = {}
        for path in self._files():
            table = _read(path, [ADDRESS, SECONDS])
            if table is not None:
                found.update(
                    zip(table[ADDRESS].to_pylist(), table[SECONDS].to_pylist(), strict=True)
                )
        return found

    def place(self, addresses: Sequence[str]) -> Path:
        """The file that `put` writes for rows with these addresses."""
        name = hashlib.sha256(" ".join(addresses).encode()).hexdigest()[:32]
        return self.folder / f"{name}.parquet"

    def work(self) -> tuple[int, float]:
        """How many rows it has results of, and the seconds that they took."""
        tables = [one for path in self._files() if (one := _read(path, [ADDRESS, SECONDS]))]
        owners = {owner for table in tables for owner in table[ADDRESS].to_pylist()}
        return len(owners), float(sum(sum(table[SECONDS].to_pylist()) for table in tables))

    def put(self, addresses: Sequence[str], results: pa.Table, seconds: float) -> None:
        """Keep the rows that came of rows with these addresses; their column `of_row` numbers them from 0.

        Raises Fault where the disk is full.
        """
        owners = [addresses[number] for number in results[OF_ROW].to_pylist()]
        table = results.drop_columns([OF_ROW]).append_column(ADDRESS, pa.array(owners, pa.string()))
        each = seconds / max(1, len(owners))
        table = table.append_column(SECONDS, pa.array([each] * len(owners), pa.float64()))
        write_table(table, self.place(addresses))

    def apply(
        self, rows: pa.Table, failures: Failures, files: Sequence[Path] | None = None
    ) -> pa.Table:
        """The rows after the stage; those dropped before stand as they were, with null in what it adds.

        `files` are those that hold the results, where it is known; else all are read.

        Raises Unfinished where a result is neither there nor among `failures`.
        """
        addresses = self.addresses(rows)
        is_kept = [not reason for reason in rows["drop_reason"].to_pylist()]
        wanted = {address for address, kept in zip(addresses, is_kept, strict=True) if kept}
        results, places = self._results(wanted, self._files() if files is None else files)
        missing = wanted - places.keys() - failures.keys()
        if missing:
            raise Unfinished(self.stage.name, len(missing))
        owners, taken, failed = list[int](), list[int | None](), list[tuple[str, str] | None]()
        for row, (address, kept) in enumerate(zip(addresses, is_kept, strict=True)):
            found: Sequence[int | None] = places.get(address, (None,)) if kept else (None,)
            owners += [row] * len(found)
            taken += found
            is_failed = kept and address not in places
            failed += [failures[address] if is_failed else None] * len(found)
        found_rows = results.take(pa.array(taken, pa.int64()))
        return self._joined(rows.take(pa.array(owners, pa.int64())), found_rows, failed)

    def joined(self, rows: pa.Table, result: pa.Table) -> pa.Table:
        """`rows` after a stage that was called with all of them; `result` has a column `of_row`."""
        rows = rows.take(result[OF_ROW])
        return self._joined(rows, result, [None] * len(rows), own_drops=True)

    def compact(self) -> None:
        """Join small files; a kill in between leaves rows twice, which readers take once."""
        paths = self._files()
        if len(paths) <= MANY_FILES:
            return
        tables = [table for path in paths if (table := _read(path)) is not None]
        whole = pa.concat_tables(tables)
        joined = self.place([path.name for path in paths])
        write_table(whole, joined)
        for path in paths:
            if path != joined:
                path.unlink(missing_ok=True)

    def _joined(
        self,
        rows: pa.Table,
        results: pa.Table,
        failed: Sequence[tuple[str, str] | None],
        own_drops: bool = False,
    ) -> pa.Table:
        """`rows` with the stage's columns and drops beside those of before; `own_drops`: it saw dropped rows too."""
        was_dropped = pc.not_equal(rows["drop_reason"], "")
        columns = {name: rows[name] for name in rows.schema.names}
        for field in self.stage.adds:
            new, old = results[field.name], columns.get(field.name)
            keep = old is not None and not own_drops
            columns[field.name] = pc.if_else(was_dropped, old, new) if keep else new
        drops = rows.select(DROPS.names).to_pylist()
        told = results.select(DROPS.names).to_pylist()
        for number, (before, now) in enumerate(zip(drops, told, strict=True)):
            reason, detail = failed[number] or (now["drop_reason"], now["drop_detail"])
            if reason and not before["drop_reason"]:
                values = (self.stage.name, reason, detail or "")
                drops[number] = dict(zip(DROPS.names, values, strict=True))
        shown = pa.Table.from_pylist(drops, schema=DROPS)
        return pa.table(columns | {name: shown[name] for name in DROPS.names})

    def _results(
        self, wanted: set[str], files: Sequence[Path]
    ) -> tuple[pa.Table, dict[str, list[int]]]:
        """All results of these addresses, and the numbers of each one's rows in the order they were computed."""
        tables, places, count = [], dict[str, list[int]](), 0
        for path in files:
            table = _read(path)
            if table is None:
                continue
            owners = table[ADDRESS].to_pylist()
            fresh = (set(owners) & wanted) - places.keys()
            kept = [number for number, owner in enumerate(owners) if owner in fresh]
            for number in kept:
                places.setdefault(owners[number], []).append(count)
                count += 1
            kept_rows = table.take(pa.array(kept, pa.int64()))
            tables.append(kept_rows.select(self.schema.names))
        return pa.concat_tables([self.schema.empty_table(), *tables]), places

    def _files(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("*.parquet") if not p.name.startswith("."))


def write_table(table: pa.Table, path: Path) -> None:
    """Write a Parquet file whole or not at all. Raises Fault where it cannot be written."""
    try:
        with renamed_when_whole(path) as partial:
            pq.write_table(table, partial)
    except OSError as error:
        raise Fault(
            f"cannot write {path}: {error.strerror or error}; free space, then give the same command again"
        ) from error


def read_table(path: Path) -> pa.Table:
    """A Parquet file; folders of its path that look like `key=value` mean nothing."""
    return pq.read_table(path, partitioning=None)


def _read(path: Path, columns: list[str] | None = None) -> pa.Table | None:
    """A file of results; None where it is damaged, or was joined with others meanwhile."""
    try:
        return pq.read_table(path, columns=columns, partitioning=None)
    except (OSError, pa.ArrowInvalid):
        return None


def digest_of(table: pa.Table) -> str:
    """A digest of a table's columns and values, however it lies in memory: Parquet leaves out what is under a null."""
    sink = pa.BufferOutputStream()
    whole = table.replace_schema_metadata(None).combine_chunks()
    pq.write_table(whole, sink, compression="none", write_statistics=False)
    return hashlib.sha256(sink.getvalue()).hexdigest()[:32]
