"""`data.exclude=FILE`: the clips that a run leaves out, one a line, as the ledger and the quarantine name them."""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sora_train.data.manifest import Manifest
from sora_train.errors import UserError

EXCLUDED = "excluded"
"""Why such a clip is not trained, where others have the reasons of the index or of the buckets."""


def excluded_rows(path: Path | str, manifest: Manifest) -> tuple[int, ...]:
    """The rows of a run's training clips that a file names, in ascending order.

    The file is a CSV table with a column `key` (and `source`, where a run has several sources with clips of one name),
    or has on each line a key, or a JSON object with one, as quarantine.jsonl has. Raises UserError with file and line
    where that is no single training clip, and where there is no such file or no clip is left.
    """
    path = Path(path).expanduser()
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(manifest.key.tolist()):
        rows_of[key].append(row)
    found = set()
    for number, key, source in _named(path):
        rows = [row for row in rows_of[key] if not source or manifest.source[row] == source]
        where = f"data.exclude={path}, line {number}: "
        if not rows:
            raise UserError(
                f"{where}{key!r} is the key of no training clip{f' of {source}' if source else ''}; keys are those of "
                "`sora data show` and of the ledger, and clips held out for validation are not trained anyway"
            )
        if len(rows) > 1:
            raise UserError(
                f"{where}{len(rows)} training clips have the key {key!r}; give a CSV table with the columns source,key"
            )
        found.add(rows[0])
    if not np.delete(manifest.drop_reason == "", list(found)).any():
        raise UserError(
            f"data.exclude={path} leaves out all {len(manifest)} training clips; take some out of it"
        )
    return tuple(sorted(found))


def _named(path: Path) -> Iterator[tuple[int, str, str]]:
    """Number of the line, key and source (or '') of each clip that a file names."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.exclude={path} cannot be read ({error}); give a file with a clip's key on each line, or leave it "
            "empty"
        ) from error
    header = next(csv.reader(lines[:1]), [])
    if "key" in header:
        table = csv.DictReader(lines)
        for row in table:
            yield table.line_num, row["key"] or "", row.get("source") or ""
        return
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text.startswith("{"):
            yield number, _key_of(text, f"data.exclude={path}, line {number}"), ""
        elif text:
            yield number, text, ""


def _key_of(text: str, where: str) -> str:
    """The `key` of a JSON object on a line."""
    try:
        return str(json.loads(text)["key"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{where}: {text[:80]!r} holds no key of a clip; mend that line") from error
