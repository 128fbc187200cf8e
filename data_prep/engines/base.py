"""What an engine is given: stages with their settings, and which of their rows have no result yet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pyarrow as pa

from data_prep.ledger import Failures, Ledger
from data_prep.stage import Stage


@dataclass(frozen=True)
class Batch:
    """Rows of one call, and where the result of each is kept."""

    addresses: list[str]
    rows: pa.Table


@dataclass(frozen=True)
class Bound:
    """A stage with its settings and its ledger."""

    stage: Stage
    settings: Any
    ledger: Ledger

    def todo(self, rows: pa.Table) -> tuple[pa.Table, int]:
        """The rows that have no result yet, each once, and how many have one."""
        addresses = self.ledger.addresses(rows)
        reasons = rows["drop_reason"].to_pylist()
        wanted = {
            a: n for n, (a, reason) in enumerate(zip(addresses, reasons, strict=True)) if not reason
        }
        there = self.ledger.done()
        left = sorted(number for address, number in wanted.items() if address not in there)
        return rows.take(pa.array(left, pa.int64())), len(wanted) - len(left)

    def batches(self, rows: pa.Table) -> Iterator[Batch]:
        """The calls that these rows make."""
        addresses, size = self.ledger.addresses(rows), self.stage.rows_at_once
        for start in range(0, len(rows), size):
            yield Batch(addresses[start : start + size], rows.slice(start, size))

    def seconds(self, rows: pa.Table) -> float:
        """The deadline of a call."""
        return sum(self.stage.seconds(row, self.settings) for row in rows.to_pylist())


class Engine(ABC):
    """Brings the results of stages that look at each row alone into their ledgers; closed at the end of a `with`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """End its processes at once."""

    @abstractmethod
    def run(self, stages: Sequence[Bound], rows: pa.Table) -> Failures:
        """Compute what has no result yet: of the first stage for `rows`, of each next one for what the last returned.

        Returns what failed for now only. Raises Fault where storage fails.
        """
