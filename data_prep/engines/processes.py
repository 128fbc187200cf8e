"""Runs stages in processes of this machine that can be killed, one stage after the other."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import pyarrow as pa

from data_prep import calls
from data_prep.engines.base import Bound, Engine
from data_prep.ledger import Failures, Ledger
from sora_train.base.progress import Progress
from sora_train.data.decode.pool import DecodePool

# Calls that wait for a process: enough that none is idle.
WAITING = 3


class Processes(Engine):
    """`workers` processes a stage (0: as many as cores), `memory_gb` each."""

    def __init__(self, out: Path, workers: int, memory_gb: float):
        self.out, self.memory_gb = out, memory_gb
        self.workers = workers or len(os.sched_getaffinity(0))

    def run(self, stages: Sequence[Bound], rows: pa.Table) -> Failures:
        failures: dict[str, tuple[str, str]] = {}
        for bound in stages:
            failures |= self._run(bound, rows)
            rows = bound.ledger.apply(rows, failures)
        return failures

    def _run(self, bound: Bound, rows: pa.Table) -> Failures:
        todo, done = bound.todo(rows)
        if not len(todo):
            return {}
        failures: dict[str, tuple[str, str]] = {}
        with (
            DecodePool(self.workers, timeout=60.0, module=calls.WORKER) as pool,
            Progress(done + len(todo), bound.stage.name, start=done) as bar,
        ):
            begun: deque[tuple[list[str], Future]] = deque()
            batches = bound.batches(todo)
            while True:
                while len(begun) < self.workers * WAITING and (batch := next(batches, None)):
                    begun.append((batch.addresses, self._submit(pool, bound, batch.rows)))
                if not begun:
                    return failures
                done += self._settle_one(bound.ledger, begun, failures)
                bar.update(done)

    def _submit(self, pool: DecodePool, bound: Bound, rows: pa.Table) -> Future:
        call = calls.call_of(bound.stage, bound.settings, self.out, rows, self.memory_gb)
        return pool.submit(call, timeout=bound.seconds(rows))

    def _settle_one(
        self, ledger: Ledger, begun: deque[tuple[list[str], Future]], failures: dict
    ) -> int:
        """Wait for a call that is done, whichever it is, and keep its answer; how many rows it had."""
        from concurrent.futures import FIRST_COMPLETED, wait

        finished = wait([future for _, future in begun], return_when=FIRST_COMPLETED).done
        place = next(n for n, (_, future) in enumerate(begun) if future in finished)
        addresses, future = begun[place]
        del begun[place]
        failures |= calls.settled(ledger, addresses, future.result())
        return len(addresses)
