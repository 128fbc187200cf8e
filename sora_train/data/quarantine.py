"""Samples that are not trained: by reason, on disk from the step they failed, with a limit."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sora_train.data.sample import Failure
from sora_train.errors import Fault, UserError

FILE_NAME = "quarantine.jsonl"


def table_of_reasons(dropped: Mapping[str, int], total: int) -> str:
    """One line: how many of all, and by reason."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items()))
    number = sum(dropped.values())
    return f"{number} of {total} clips ({100 * number / max(total, 1):.1f} %): {reasons or 'none'}"


class Quarantine:
    """Samples that failed to decode, kept in an append-only file that all ranks of a run share.

    An entry applies from its step on, so that a run resumed from an earlier step gets the same
    failures. Checkpoints hold the lines too (`lines`, `restore`), so that they can be moved to another
    folder. `dropped` counts the samples that were unusable before the run. Raises UserError at once,
    and Fault in `add`, where more than `limit` of `total` are lost.
    """

    def __init__(self, path: Path | None, *, total: int, limit: float, dropped: Mapping[str, int]):
        self.path = path
        self.total, self.limit = total, limit
        self._dropped = dict(dropped)
        self._entries: dict[int, dict[str, Any]] = {}
        self._read = 0
        if sum(self._dropped.values()) > limit * total:
            raise UserError(
                f"{table_of_reasons(self._dropped, total)} cannot be trained, more than "
                f"data.max_drop_fraction={limit:g} allows; mend or remove them, or raise it"
            )
        self.refresh()

    def __len__(self) -> int:
        return len(self._entries)

    def rows(self) -> list[int]:
        """The rows that failed in this run."""
        return list(self._entries)

    def counts(self) -> dict[str, int]:
        """Samples lost by reason, those of the index included."""
        failed = Counter(str(line["reason"]) for line in self._entries.values())
        return dict(Counter(self._dropped) + failed)

    def failure(self, row: int, step: int) -> Failure | None:
        """Why a row must not be trained at a step, if it was quarantined by then."""
        line = self._entries.get(row)
        if line is None or line["step"] > step:
            return None
        return Failure(row, str(line["reason"]), str(line["detail"]))

    def add(self, step: int, failure: Failure, *, on_disk: bool = True, **where: object) -> None:
        """Record a failure with its shard, key and backend; `on_disk` by one of the processes that read the clip."""
        self.refresh()
        if self.failure(failure.row, step):
            return
        line = {
            "step": step,
            "row": failure.row,
            "reason": failure.reason,
            **where,
            "detail": failure.detail,
        }
        self._entries[failure.row] = line
        if on_disk:
            self._append([line])
        self._check()

    def detach(self) -> None:
        """Record nothing more on disk and drop the limit, for readers that are no part of the run."""
        self.path, self.limit = None, 1.0

    def lines(self) -> list[dict[str, Any]]:
        """The lines for a checkpoint: one for each failed sample, in the order of rows."""
        self.refresh()
        return [self._entries[row] for row in sorted(self._entries)]

    def restore(self, lines: Iterable[dict[str, Any]], *, record: bool) -> None:
        """Add the unknown lines of a checkpoint; with `record` (one rank) to the file too."""
        self.refresh()
        missing = [line for line in lines if not self.failure(line["row"], line["step"])]
        self._entries.update({line["row"]: line for line in missing})
        if record:
            self._append(missing)
        self._check()

    def _append(self, lines: list[dict[str, Any]]) -> None:
        if self.path is not None and lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # One write in append mode: lines of several ranks do not mix.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, text.encode())
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def refresh(self) -> None:
        """Read the lines that other ranks and earlier runs recorded."""
        if self.path is None or not self.path.exists() or self.path.stat().st_size == self._read:
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        # A line that is still being written is read by the next call.
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
                row, step = int(entry["row"]), int(entry["step"])
                if not isinstance(entry["reason"] + entry["detail"], str):
                    raise TypeError("reason and detail are text")
            except (ValueError, KeyError, TypeError) as error:
                raise Fault(
                    f"{self.path} holds a damaged line, {line[:80]!r}; remove that line"
                ) from error
            if row not in self._entries or step < self._entries[row]["step"]:
                self._entries[row] = entry
        self._check()

    def _check(self) -> None:
        lost = self.counts()
        if sum(lost.values()) > self.limit * self.total:
            raise Fault(
                f"{table_of_reasons(lost, self.total)} are lost, more than data.max_drop_fraction={self.limit:g} "
                f"allows; see {self.path or 'the reasons'}, repair the clips or raise it"
            )
