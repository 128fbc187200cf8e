"""Keeps one of all copies of a clip: the best of this run, or the one that a run before has kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from data_prep.dedup.groups import groups_of
from data_prep.dedup.index import ENTRIES, read_index, write_index
from data_prep.dedup.pairs import Clip, Pairs, found_pairs, measured
from data_prep.dedup.volume import FORMAT, SIDE, TIMES
from data_prep.stage import Stage, Workspace
from sora_train.config.sections.base import Section
from sora_train.errors import UserError

DUPLICATE = "duplicate"


class DedupConfig(Section):
    """`dedup:`"""

    distance: float = Field(0.25, ge=0, le=1)
    """The largest distance between fingerprints of copies: 0 for the same picture at every time, about 1 for two that
    have nothing in common."""
    embedding: str = ""
    """A column of lists of numbers, such as a stage of your own gives, whose near neighbours are duplicates too."""
    embedding_cosine: float = Field(0.95, gt=0, le=1)
    """The cosine from which on two embeddings are near."""
    index: str = ""
    """A folder that remembers what runs have kept: a clip that another run has kept is dropped, and those that this run
    keeps are added. Empty: this run alone counts."""
    run: str = ""
    """What this run is called in the index; empty: the path of its output folder."""


def dedup(rows: pa.Table, settings: DedupConfig, workspace: Workspace) -> pa.Table:
    """`duplicate_of` is the key of the kept copy, `RUN:KEY` where another run has kept it, and empty for a kept clip.

    Copies are grouped by the pairs that were verified, so the kept one may be further away than `dedup.distance` where
    a copy lies between; `duplicate_distance` is the distance to it, null where it cannot be measured. A clip that the
    index holds of this run stays whatever other runs have kept meanwhile. `fingerprint` is emptied: nothing that
    follows needs it. Raises UserError for an embedding column that is not there, and an index that cannot be read.
    """
    run = settings.run or str(workspace.out)
    folder = Path(settings.index).expanduser() if settings.index else None
    index = read_index(folder) if folder else ENTRIES.empty_table()
    numbers = [n for n, reason in enumerate(rows["drop_reason"].to_pylist()) if not reason]
    numbers.sort(key=lambda n: (rows["key"][n].as_py(), rows["digest"][n].as_py() or ""))
    entries = _entries(rows.take(pa.array(numbers, pa.int64())), run, settings)
    clips, own = _clips(rows, numbers, entries, index, run)
    cosine = 1 - settings.embedding_cosine if settings.embedding else -1.0
    pairs = found_pairs(clips, settings.distance, cosine)
    kept_of = _keepers(clips, pairs, own)
    pairs = {
        **measured(clips, [pair for pair in kept_of.items() if _in_order(pair) not in pairs]),
        **pairs,
    }
    result = _result(rows, clips, numbers, kept_of, pairs)
    if folder:
        is_kept = pa.array([n not in kept_of for n in range(len(entries))], pa.bool_())
        write_index(folder, run, entries.filter(is_kept))
    return result


def _entries(rows: pa.Table, run: str, settings: DedupConfig) -> pa.Table:
    """What the index would hold of these rows."""
    if settings.embedding:
        _check_embedding(rows, settings.embedding)
    count = len(rows)
    columns: dict[str, Any] = {
        "run": pa.array([run] * count, pa.string()),
        "format": pa.array([FORMAT] * count, pa.int64()),
        "embedding": rows[settings.embedding] if settings.embedding else pa.nulls(count),
    }
    for name in ENTRIES.names:
        columns.setdefault(name, rows[name] if name in rows.schema.names else pa.nulls(count))
    return pa.table(columns).select(ENTRIES.names).cast(ENTRIES)


def _check_embedding(rows: pa.Table, name: str) -> None:
    """Raises UserError for a column that is not there, holds no lists of numbers, or lists of several lengths."""
    if name not in rows.schema.names:
        names = ", ".join(sorted(rows.schema.names))
        raise UserError(f"dedup.embedding={name} is no column; columns: {names}")
    kind = rows[name].type
    if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise UserError(f"dedup.embedding={name} holds {kind}; it must hold lists of numbers")
    lengths = {
        len(value): key
        for key, value in zip(rows["key"].to_pylist(), rows[name].to_pylist(), strict=True)
        if value is not None
    }
    if len(lengths) > 1:
        told = " and ".join(f"{size} numbers for {key}" for size, key in sorted(lengths.items()))
        raise UserError(f"dedup.embedding={name} has {told}; all must have as many")


def _clips(
    rows: pa.Table, numbers: Sequence[int], entries: pa.Table, index: pa.Table, run: str
) -> tuple[list[Clip], set[int]]:
    """This run's clips in the order of `numbers`, then the index's of other runs; and which the index has of this."""
    known = {
        (row["key"], row["digest"]) for row in _without(index).to_pylist() if row["run"] == run
    }
    mine = [
        _clip(entry, "", _quality(rows, n))
        for entry, n in zip(entries.to_pylist(), numbers, strict=True)
    ]
    others = [_clip(entry, entry["run"], ()) for entry in index.to_pylist() if entry["run"] != run]
    own = {number for number, clip in enumerate(mine) if (clip.key, clip.digest) in known}
    return mine + others, own


def _without(index: pa.Table) -> pa.Table:
    return index.select(["run", "key", "digest"])


def _quality(rows: pa.Table, number: int) -> tuple[Any, ...]:
    """Sorts the best first: resolution, then length, then bits a second."""

    def value(name: str) -> float:
        return (rows[name][number].as_py() or 0) if name in rows.schema.names else 0

    return -value("width") * value("height"), -value("duration"), -value("bit_rate")


def _clip(entry: Mapping[str, Any], run: str, quality: tuple[Any, ...]) -> Clip:
    stored, embedding = entry["fingerprint"], entry["embedding"]
    shape = (TIMES, SIDE, SIDE)
    vector = np.array(embedding, np.float32) if embedding is not None else np.zeros(0, np.float32)
    length = float(np.linalg.norm(vector))
    return Clip(
        entry["key"],
        entry["kind"] or "",
        entry["digest"] or "",
        entry["source_digest"] or "",
        entry["begin"] or 0.0,
        entry["end"] or 0.0,
        entry["frames"] or 0,
        entry["duration"] or 0.0,
        np.frombuffer(stored, np.uint8).reshape(shape) if stored is not None else None,
        vector / length if length > 0 and np.isfinite(length) else None,
        run,
        (*quality, entry["key"], entry["digest"] or ""),
    )


def _keepers(clips: Sequence[Clip], pairs: Pairs, own: set[int]) -> dict[int, int]:
    """The kept clip of each dropped one, by their numbers."""
    kept_of: dict[int, int] = {}
    for group in groups_of(len(clips), pairs):
        mine = [n for n in group if not clips[n].run]
        others = [n for n in group if clips[n].run]
        if others and not own & set(mine):
            kept_of |= dict.fromkeys(mine, others[0])
        else:
            keeper = min(mine, key=lambda n: clips[n].best)
            kept_of |= {n: keeper for n in mine if n != keeper}
    return kept_of


def _in_order(pair: tuple[int, int]) -> tuple[int, int]:
    return (pair[0], pair[1]) if pair[0] < pair[1] else (pair[1], pair[0])


def _result(
    rows: pa.Table,
    clips: Sequence[Clip],
    numbers: Sequence[int],
    kept_of: Mapping[int, int],
    pairs: Pairs,
) -> pa.Table:
    found: list[dict[str, Any]] = [
        dict.fromkeys(("duplicate_of", "duplicate_kind", "drop_reason", "drop_detail"), "")
        for _ in range(len(rows))
    ]
    for dropped, kept in kept_of.items():
        keeper = clips[kept]
        name = f"{keeper.run}:{keeper.key}" if keeper.run else keeper.key
        pair = (dropped, kept)
        kind, apart = pairs.get(_in_order(pair)) or pairs.get(pair) or ("a copy of a copy", None)
        how = kind if apart is None else f"{kind}, distance {apart:.3f}"
        found[numbers[dropped]] = {
            "duplicate_of": name,
            "duplicate_kind": kind,
            "duplicate_distance": apart,
            "drop_reason": DUPLICATE,
            "drop_detail": f"of {name} ({how})",
        }
    schema = STAGE.adds
    for column in ("drop_reason", "drop_detail"):
        schema = schema.append(pa.field(column, pa.string()))
    return pa.Table.from_pylist(found, schema=schema)


def _check(settings: DedupConfig) -> None:
    if settings.index and Path(settings.index).expanduser().is_file():
        raise UserError(f"dedup.index={settings.index} is a file; give a folder, which may be new")


STAGE = Stage(
    name="dedup",
    run=dedup,
    config=DedupConfig,
    adds=pa.schema(
        [
            ("duplicate_of", pa.string()),
            ("duplicate_distance", pa.float64()),
            ("duplicate_kind", pa.string()),
            ("fingerprint", pa.binary()),
        ]
    ),
    reads_also=lambda settings: (settings.embedding,) if settings.embedding else (),
    whole=True,
    # Of what the index holds, the rows say nothing.
    is_remembered=False,
    check=_check,
)
