"""Runs stages on a Ray cluster: rows stream through all stages that look at them alone, each with actors of its own.

Every stage has as many actors as the cluster has cores, each counted as a part of one: Ray's own pools, which grow and
shrink, starve the slowest stage (ray#65540). An actor hands its rows to a process of its own that can be killed, and
writes the results to the ledger, which must be on storage that all nodes share; what Ray passes on is only what is to
be done next. So workers, nodes and the command itself may die: the next run begins at what the ledger lacks.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep import calls
from data_prep.engines.base import Bound, Engine
from data_prep.ledger import Failures, Ledger
from data_prep.stage import Workspace, load_stage
from sora_train.base.progress import Progress
from sora_train.errors import UserError

REACH_SECONDS = 10.0
ROW, ORIGIN, LATER = "row", "origin", "later"
"""Columns of what streams: a row as bytes, the number of the row that it came of, and what failed for now only."""


class RayCluster(Engine):
    """The cluster at `address` (empty: one that is started here); `workers` actors a stage, 0: as many as cores."""

    def __init__(self, out: Path, address: str, workers: int, memory_gb: float):
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise UserError(
                "engine=ray needs Ray; install it with `pip install 'sora_train[prep]'`"
            ) from error
        _require_reachable(address)
        self._ray: Any = ray
        self.out, self.memory_gb = out, memory_gb
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.ERROR)
        # A cluster that is started here needs no page of its own.
        own: dict[str, Any] = {} if address else {"include_dashboard": False}
        try:
            self._ray.init(
                address=address or None,
                ignore_reinit_error=True,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **own,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"address={address or 'a cluster of this machine'}: no Ray cluster can be reached ({error}); start one "
                "with `ray start --head`, or give HOST:PORT of one"
            ) from error
        self.workers = workers or max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        context = self._ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.verbose_progress = False

    def run(self, stages: Sequence[Bound], rows: pa.Table) -> Failures:
        failures: dict[str, tuple[str, str]] = {}
        for number, bound in enumerate(stages):
            # Of a run that goes on, some rows enter in the middle.
            todo, _ = bound.todo(rows)
            if len(todo):
                failures |= self._stream(stages[number:], todo)
            rows = bound.ledger.apply(rows, failures)
        return failures

    def close(self) -> None:
        self._ray.shutdown()

    def _stream(self, stages: Sequence[Bound], rows: pa.Table) -> Failures:
        # A block a call of the first stage: a block goes to one actor.
        size = stages[0].stage.rows_at_once
        stream = _as_stream(rows)
        data = self._ray.data.from_arrow(
            [stream.slice(start, size) for start in range(0, len(rows), size)]
        )
        for bound in stages:
            data = data.map_batches(
                StageActor,
                fn_constructor_args=(
                    bound.stage.module,
                    bound.settings.model_dump_json(),
                    str(self.out),
                    self.memory_gb,
                ),
                batch_size=bound.stage.rows_at_once,
                batch_format="pyarrow",
                compute=self._ray.data.ActorPoolStrategy(size=self._actors(bound)),
                # Some of each core is left for what Ray does itself.
                num_cpus=0.8 / len(stages),
                num_gpus=bound.stage.gpus or None,
            )
        failures: dict[str, tuple[str, str]] = {}
        seen: set[int] = set()
        names = ", ".join(bound.stage.name for bound in stages)
        with Progress(len(rows), names) as bar:
            for batch in data.iter_batches(batch_size=None, batch_format="pyarrow"):
                seen |= set(batch[ORIGIN].to_pylist())
                for text in batch[LATER].to_pylist():
                    if text:
                        failures |= {key: tuple(why) for key, why in json.loads(text).items()}
                bar.update(len(seen))
        return failures

    def _actors(self, bound: Bound) -> int:
        if not bound.stage.gpus:
            return self.workers
        there = self._ray.cluster_resources().get("GPU", 0)
        if there < bound.stage.gpus:
            raise UserError(
                f"the stage {bound.stage.name} needs {bound.stage.gpus:g} GPUs and the cluster has {there:g}; add a "
                "node with one"
            )
        return int(there / bound.stage.gpus)


def _require_reachable(address: str) -> None:
    """Raises UserError where nobody listens at HOST:PORT: Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # `auto`, or none
    try:
        socket.create_connection((host, int(port)), REACH_SECONDS).close()
    except (OSError, ValueError) as error:
        raise UserError(
            f"address={address}: no Ray cluster can be reached there ({error}); start one with `ray start --head`, or "
            "give HOST:PORT of one"
        ) from error


class StageActor:
    """Brings what a stage returns for rows into its ledger, and passes on the rows that it computed."""

    def __init__(self, module: str, settings: str, out: str, memory_gb: float):
        from sora_train.data.decode.pool import DecodePool

        stage = load_stage(module)
        values = stage.config.model_validate_json(settings)
        ledger = Ledger(Workspace(Path(out)).ledger, stage, values)
        self.bound = Bound(stage, values, ledger)
        self.out, self.memory_gb = Path(out), memory_gb
        self.done = set(ledger.done())
        self._pool = DecodePool(1, timeout=60.0, module=calls.WORKER)

    def __call__(self, batch: pa.Table) -> pa.Table:
        entries = batch.to_pylist()
        # Dropped rows, and those that failed for now, pass by; of what was done before another run takes the rest.
        passing = [entry for entry in entries if entry[LATER] or _is_dropped(entry)]
        coming = [entry for entry in entries if entry not in passing]
        if not coming:
            return _stream_of(passing)
        rows = pa.concat_tables([calls.from_bytes(entry[ROW]) for entry in coming])
        addresses = self.bound.ledger.addresses(rows)
        new = [number for number, address in enumerate(addresses) if address not in self.done]
        if not new:
            return _stream_of(passing)
        rows, addresses = rows.take(new), [addresses[number] for number in new]
        call = calls.call_of(self.bound.stage, self.bound.settings, self.out, rows, self.memory_gb)
        future: Future = self._pool.submit(call, self.bound.seconds(rows))
        answer = future.result()
        later = calls.settled(self.bound.ledger, addresses, answer)
        origins = [coming[number][ORIGIN] for number in new]
        self.done |= set(addresses) - later.keys()
        if later:
            passing.append({ROW: b"", ORIGIN: origins[0], LATER: json.dumps(later)})
        return _stream_of([*passing, *self._after(rows, addresses, origins, later)])

    def _after(
        self, rows: pa.Table, addresses: list[str], origins: list[int], later: Failures
    ) -> list[dict[str, Any]]:
        """The rows that the stage made, each with the number of the one that entered the stream."""
        if later:
            return []
        numbered = rows.append_column("_origin", pa.array(origins, pa.int64()))
        after = self.bound.ledger.apply(numbered, {}, [self.bound.ledger.place(addresses)])
        numbers = after["_origin"].to_pylist()
        plain = after.drop_columns(["_origin"])
        return [
            {ROW: calls.as_bytes(plain.slice(number, 1)), ORIGIN: origin, LATER: ""}
            for number, origin in enumerate(numbers)
        ]


def _is_dropped(entry: dict[str, Any]) -> bool:
    return bool(calls.from_bytes(entry[ROW])["drop_reason"][0].as_py())


def _as_stream(rows: pa.Table) -> pa.Table:
    return _stream_of(
        [
            {ROW: calls.as_bytes(rows.slice(number, 1)), ORIGIN: number, LATER: ""}
            for number in range(len(rows))
        ]
    )


def _stream_of(entries: list[dict[str, Any]]) -> pa.Table:
    schema = pa.schema([(ROW, pa.binary()), (ORIGIN, pa.int64()), (LATER, pa.string())])
    return pa.Table.from_pylist(entries, schema=schema)
