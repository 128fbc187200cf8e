"""Whatever is killed when: any order of clients, workers, lost leases and lost answers delivers every job at most once.

The machine keeps what the store promised and nothing else. Workers never forget a lease, so that those long lost come
back and try; and every call may lose its connection before it began or after it was committed, and is then made again.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
from databases import Postgres
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from sora_train.serving.jobs.job import Asked, Job, Lease
from sora_train.serving.jobs.store import MAX_ATTEMPTS, JobStore
from sora_train.serving.jobs.tables import METADATA

LEASE = 10.0
LOST = st.sampled_from(["no", "no", "before", "after"])


class AnswerLost(Exception):
    pass


class Jobs(RuleBasedStateMachine):
    """`url` says where; empty for a new file."""

    url = ""
    leases = Bundle("leases")
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.folder = tempfile.TemporaryDirectory()
        url = self.url or f"sqlite:///{self.folder.name}/jobs.db"
        self.store = JobStore(url, clock=lambda: self.now, endpoints=["http://a"])
        if self.url:
            METADATA.drop_all(self.store.database.engine)
            METADATA.create_all(self.store.database.engine)
        self.order: list[str] = []
        self.state: dict[str, str] = {}
        self.until: dict[str, float] = {}
        self.attempts: dict[str, int] = {}
        self.holder: dict[str, str | None] = {}
        self.delivered: dict[str, int] = {}
        self.counter = 0

    def teardown(self) -> None:
        self.store.database.close()
        self.folder.cleanup()

    def call(self, lost: str, make: Callable[[], Any]) -> Any:
        """The answer a client has in the end, who calls again where none came."""
        if lost == "after":
            make()
        if lost != "no":
            self.cut()
        return make()

    def cut(self) -> None:
        """Connections end, and whatever was not committed with them."""
        self.store.database.engine.dispose()

    @initialize(target=jobs)
    def first(self) -> str:
        return self.create("no")

    @rule(target=jobs, lost=LOST)
    def create(self, lost: str) -> str:
        self.counter += 1
        key, asked = f"key {self.counter}", Asked("create", str(self.counter), "m", 4.0, (64, 48))
        job: Job = self.call(lost, lambda: self.store.create("o", asked, idempotency_key=key))[0]
        assert job.id not in self.state and job.asked == asked
        self.order.append(job.id)
        self.state[job.id], self.until[job.id] = "queued", 0.0
        self.attempts[job.id], self.holder[job.id] = 0, None
        return job.id

    @rule(target=leases, worker=st.sampled_from("abc"))
    def claim(self, worker: str) -> Any:
        lease = self.store.claim(worker, lease_seconds=LEASE)
        for job in self.order:
            if self.state[job] not in ("queued", "in_progress") or self.until[job] > self.now:
                continue
            if self.attempts[job] == MAX_ATTEMPTS:
                self.state[job], self.holder[job] = "failed", None
                continue
            assert lease is not None and lease.job.id == job, "the oldest that is free"
            self.state[job], self.until[job] = "in_progress", self.now + LEASE
            self.attempts[job] += 1
            self.holder[job] = lease.token
            assert lease.job.attempts == self.attempts[job]
            return lease
        assert lease is None
        return multiple()

    @rule(worker=st.sampled_from("abc"))
    def claim_whose_answer_is_lost(self, worker: str) -> None:
        """Nobody knows that it has the job, which is free again when the lease ends."""
        self.claim(worker)
        self.cut()

    def held(self, lease: Lease) -> bool:
        job = lease.job.id
        return self.state[job] == "in_progress" and self.holder[job] == lease.token

    @rule(lease=leases, lost=LOST, progress=st.integers(-5, 200))
    def heartbeat(self, lease: Lease, lost: str, progress: int) -> None:
        beat = lambda: self.store.heartbeat(lease, progress, lease_seconds=LEASE)  # noqa: E731
        assert self.call(lost, beat) == self.held(lease)
        if self.held(lease):
            self.until[lease.job.id] = self.now + LEASE
            found = self.store.get(lease.job.id)
            assert found is not None and 0 <= found.progress <= 100

    @rule(lease=leases, lost=LOST)
    def complete(self, lease: Lease, lost: str) -> None:
        held = self.held(lease)
        again = self.state[lease.job.id] == "completed" and self.holder[lease.job.id] == lease.token
        outputs = {"video": lease.token}
        done = self.call(
            lost, lambda: self.store.complete(lease, outputs=outputs, facts={}, usage={})
        )
        assert done == (held or again)
        if held:
            self.state[lease.job.id] = "completed"
            self.delivered[lease.job.id] = self.delivered.get(lease.job.id, 0) + 1

    @rule(lease=leases, lost=LOST)
    def fail(self, lease: Lease, lost: str) -> None:
        held = self.held(lease)
        again = self.state[lease.job.id] == "failed" and self.holder[lease.job.id] == lease.token
        done = self.call(lost, lambda: self.store.fail(lease, code="c", message="m"))
        assert done == (held or again)
        if held:
            self.state[lease.job.id] = "failed"

    @rule(lease=leases, reason=st.sampled_from(["", "full"]), pause=st.sampled_from([0.0, 5.0]))
    def release(self, lease: Lease, reason: str, pause: float) -> None:
        held = self.held(lease)
        assert self.store.release(lease, reason=reason, pause=pause) == held
        if held:
            job = lease.job.id
            self.state[job], self.holder[job] = "queued", None
            self.until[job] = self.now + pause
            self.attempts[job] -= not reason

    @rule(job=consumes(jobs), lost=LOST)
    def delete(self, job: str, lost: str) -> None:
        if lost == "no":
            assert self.store.delete(job, "o")
        else:
            self.call(lost, lambda: self.store.delete(job, "o"))
        self.state[job] = "cancelled"

    @rule(seconds=st.sampled_from([1.0, 4.0, 10.5]))
    def time_goes_on(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def the_store_says_what_was_promised(self) -> None:
        listed = [job for job in self.order if self.state[job] != "cancelled"]
        found, more = self.store.page("o", limit=1000, ascending=True)
        assert [job.id for job in found] == listed and not more
        for job in found:
            assert (job.status, job.attempts) == (self.state[job.id], self.attempts[job.id])
            if job.status == "completed":
                assert job.outputs == {"video": self.holder[job.id]}
        assert all(count == 1 for count in self.delivered.values())

    @invariant()
    def news_is_told_once(self) -> None:
        with self.store.database.read() as connection:
            rows = connection.exec_driver_sql("SELECT type, job FROM webhooks").all()
        told = [tuple(row) for row in rows]
        assert len(set(told)) == len(told)
        ended = {
            (f"video.{state}", job)
            for job, state in self.state.items()
            if state in ("completed", "failed")
        }
        # A job may have been deleted after it had ended.
        assert ended <= set(told)
        assert all(
            self.state[job] in (kind.removeprefix("video."), "cancelled") for kind, job in told
        )


def explore(machine: type[Jobs], examples: int, **more: Any) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    limits = settings(
        max_examples=examples, stateful_step_count=30, suppress_health_check=checks, **more
    )
    run_state_machine_as_test(machine, settings=limits)


def test_jobs_on_sqlite() -> None:
    explore(Jobs, 60)


def test_jobs_on_postgresql(postgres: Postgres) -> None:
    class OnPostgres(Jobs):
        url = postgres.new_database()

        def cut(self) -> None:
            """The server ends the connections of the pool, which finds out by itself."""
            postgres.cut()

    explore(OnPostgres, 30)


def test_the_machine_finds_a_store_without_fences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a lease is not asked for its token, the machine says so."""
    import sqlalchemy as sql

    from sora_train.serving.jobs import store

    def unfenced(lease: Lease) -> Any:
        return sql.and_(store.JOBS.c.id == lease.job.id, store.JOBS.c.status == "in_progress")

    monkeypatch.setattr(store, "_held", unfenced)
    with pytest.raises(AssertionError):
        explore(Jobs, 200, phases=[Phase.generate], report_multiple_bugs=False, database=None)
