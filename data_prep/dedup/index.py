"""What other runs have kept, so that the next does not keep it again: a folder of Parquet files, one or two a run.

A file is named by what it holds and written under another name first, so one that is killed leaves nothing, and two
runs at once do not meet. A run knows its own files by its name; it writes the new one before it removes the old.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.dedup.volume import FORMAT
from data_prep.ledger import digest_of, write_table
from sora_train.errors import UserError

ENTRIES = pa.schema(
    [
        ("run", pa.string()),
        ("format", pa.int64()),
        ("key", pa.string()),
        ("kind", pa.string()),
        ("digest", pa.string()),
        ("source_digest", pa.string()),
        ("begin", pa.float64()),
        ("end", pa.float64()),
        ("frames", pa.int64()),
        ("duration", pa.float64()),
        ("fingerprint", pa.binary()),
        ("embedding", pa.list_(pa.float32())),
    ]
)


def read_index(folder: Path) -> pa.Table:
    """All entries, sorted by run and key; those of fingerprints of another kind without them.

    Raises UserError for a file that holds none.
    """
    tables = [ENTRIES.empty_table()]
    for path in sorted(folder.glob("*.parquet")):
        if path.name.startswith("."):
            continue
        try:
            table = pq.read_table(path, partitioning=None).select(ENTRIES.names).cast(ENTRIES)
        except FileNotFoundError:
            continue  # its run has just replaced it
        except (OSError, pa.ArrowInvalid, pa.ArrowTypeError, KeyError) as error:
            raise UserError(
                f"dedup.index={folder} holds {path.name}, which is no index of kept clips ({error}); remove it"
            ) from error
        tables.append(table)
    entries = pa.concat_tables(tables)
    old = [number != FORMAT for number in entries["format"].to_pylist()]
    if any(old):
        kept = [
            None if is_old else value
            for is_old, value in zip(old, entries["fingerprint"].to_pylist(), strict=True)
        ]
        at = entries.schema.get_field_index("fingerprint")
        entries = entries.set_column(at, ENTRIES.field(at), pa.array(kept, pa.binary()))
    return entries.sort_by([("run", "ascending"), ("key", "ascending")])


def write_index(folder: Path, run: str, entries: pa.Table) -> None:
    """Make `entries` all that the index holds of this run. Raises Fault where the folder cannot be written."""
    entries = entries.select(ENTRIES.names).cast(ENTRIES).sort_by([("key", "ascending")])
    prefix = hashlib.sha256(run.encode()).hexdigest()[:16]
    path = folder / f"{prefix}-{digest_of(entries)}.parquet"
    if not path.exists():
        write_table(entries, path)
    for other in folder.glob(f"{prefix}-*.parquet"):
        if other != path:
            other.unlink(missing_ok=True)
