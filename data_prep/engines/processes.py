"""Runs stages in processes of this machine that can be killed, one stage after the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

import pyarrow as pa

from data_prep import calls
from data_prep.engines.base import Bound, Engine
from data_prep.ledger import Failures
from sora_train.base.progress import Progress
from sora_train.data.decode.pool import DecodePool

# Calls a process has waiting, so that none is idle while answers are written.
WAITING = 3


class Processes(Engine):
    """`workers` processes (0: as many as cores) of `memory_gb` each, started once and killed where a row needs it."""

    def __init__(self, out: Path, workers: int, memory_gb: float):
        self.out, self.memory_gb = out, memory_gb
        self.workers = workers or len(os.sched_getaffinity(0))
        self._pool: DecodePool | None = None

    def run(self, stages: Sequence[Bound], rows: pa.Table) -> Failures:
        failures: dict[str, tuple[str, str]] = {}
        for bound in stages:
            failures |= self._run(bound, rows)
            rows = bound.ledger.apply(rows, failures)
        return failures

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _run(self, bound: Bound, rows: pa.Table) -> Failures:
        todo, done = bound.todo(rows)
        if not len(todo):
            return {}
        if self._pool is None:
            self._pool = DecodePool(self.workers, timeout=60.0, module=calls.WORKER)
        failures: dict[str, tuple[str, str]] = {}
        begun: dict[Future, list[str]] = {}
        batches = bound.batches(todo)
        with Progress(done + len(todo), bound.stage.name, start=done) as bar:
            while True:
                while len(begun) < self.workers * WAITING and (batch := next(batches, None)):
                    call = calls.call_of(
                        bound.stage, bound.settings, self.out, batch.rows, self.memory_gb
                    )
                    begun[self._pool.submit(call, bound.seconds(batch.rows))] = batch.addresses
                if not begun:
                    return failures
                for future in wait(begun, return_when=FIRST_COMPLETED).done:
                    addresses = begun.pop(future)
                    failures |= calls.settled(bound.ledger, addresses, future.result())
                    done += len(addresses)
                    bar.update(done)
