"""The store of jobs: created once, leased to one worker at a time, ended once; on both databases."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sql
from databases import Postgres
from sentences import refuses, says

from sora_train.errors import UserError
from sora_train.serving.jobs.job import (
    Asked,
    DatabaseAway,
    KeyReused,
    UnknownJob,
    Upload,
)
from sora_train.serving.jobs.store import JobStore
from sora_train.serving.jobs.tables import JOBS, USAGE

DONE = {"outputs": {"video": "v"}, "facts": {"seconds": 4.0}, "usage": {"cost": 1.0}}


def asked(prompt: str = "a ring", **values) -> Asked:
    return Asked("create", prompt, "tiny", values.pop("seconds", 4.0), (64, 48), **values)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(database_url: str, clock: Clock) -> JobStore:
    made = JobStore(database_url, clock=clock, endpoints=["http://a", "http://b"])
    yield made
    made.database.close()


def news(store: JobStore) -> list[tuple[str, str, str]]:
    """(type, job, endpoint) of all news."""
    with store.database.read() as connection:
        rows = connection.exec_driver_sql(
            "SELECT type, job, endpoint FROM webhooks ORDER BY number"
        )
        return [tuple(row) for row in rows]


def test_a_request_sent_twice_is_one_though_its_files_get_other_names() -> None:
    def sent(job: str, digest: str = "d1") -> str:
        name = f"inputs/{job}/cue-0.png"
        cues = [{"at": 0.0, "image": name}, {"at": 2.0, "prompt": "a ring"}]
        return asked(uploads=(Upload(name, "image", digest),), storyboard=cues).fingerprint()

    assert sent("video_1") == sent("video_2") != sent("video_2", "d2")


def test_a_job_comes_back_as_it_was_asked(store: JobStore) -> None:
    cues = [{"at": 0.0, "prompt": "a\u2028b 'x' -- %s :name"}]
    files = Upload("inputs/x/a.png", "image", "d1"), Upload("inputs/x/b.mp4", "video", "d2")
    whole = asked(
        "é\u0000🎬 '; DROP TABLE jobs; --",
        storyboard=cues,
        uploads=files,
        adapters=("a:0.5",),
        seed=2**63 - 1,
        source="video_0",
        character=("char_1",),
    )
    job, is_new = store.create("o", whole)
    assert is_new and job.asked == whole and store.get(job.id) == job
    assert (job.status, job.progress, job.created_at, job.error) == ("queued", 0, 1000, None)
    assert store.get(job.id, "o") == job and store.get(job.id, "p") is None


@pytest.mark.parametrize(
    "text", ["", "video_x", "video_\0" + 23 * "0", "\udc80", "../jobs.db", "%"]
)
def test_what_is_no_id_is_no_job(store: JobStore, text: str) -> None:
    assert store.get(text) is None and not store.delete(text, "o")
    assert store.get_character(text, "o") is None
    with refuses(UnknownJob, "after"):
        store.page("o", after=text)


def test_jobs_are_claimed_in_the_order_they_came(store: JobStore, clock: Clock) -> None:
    ids = [store.create(f"o{i % 3}", asked())[0].id for i in range(5)]
    first = [store.claim("w", lease_seconds=10) for _ in range(2)]
    assert [one.job.id for one in first] == ids[:2]
    clock.now += 11
    # Those whose worker is lost come before younger ones.
    assert [store.claim("w", lease_seconds=10).job.id for _ in range(5)] == ids
    assert store.claim("w", lease_seconds=10) is None


def test_a_stale_lease_changes_nothing(store: JobStore, clock: Clock) -> None:
    job, _ = store.create("o", asked())
    stale = store.claim("slow", lease_seconds=10)
    clock.now += 9.9
    assert store.claim("quick", lease_seconds=10) is None
    clock.now += 0.2
    held = store.claim("quick", lease_seconds=10)
    assert held.token != stale.token and held.job.attempts == 2
    before = store.get(job.id)
    assert not store.heartbeat(stale, 50)
    assert not store.complete(stale, **DONE)
    assert not store.fail(stale, code="c", message="m")
    assert not store.release(stale)
    assert store.get(job.id) == before and news(store) == []
    assert store.complete(held, **DONE)
    assert not store.complete(stale, **DONE) and not store.fail(stale, code="c", message="m")
    assert not store.fail(held, code="c", message="m")
    assert [(kind, one) for kind, one, _ in news(store)] == [("video.completed", job.id)] * 2


def test_a_late_worker_keeps_what_nobody_took(store: JobStore, clock: Clock) -> None:
    job, _ = store.create("o", asked())
    lease = store.claim("w", lease_seconds=10)
    clock.now += 60
    assert store.heartbeat(lease, 7, lease_seconds=10)
    assert store.claim("v", lease_seconds=10) is None
    assert store.get(job.id).progress == 7
    clock.now += 60
    assert store.complete(lease, **DONE, keep_seconds=30)
    done = store.get(job.id)
    assert (done.status, done.progress, done.completed_at, done.expires_at) == (
        "completed", 100, 1120, 1150,
    )  # fmt: skip
    assert (done.outputs, done.facts, done.usage) == tuple(DONE.values())


def test_an_answer_that_was_lost_is_given_again(store: JobStore) -> None:
    """`complete` and `fail` of the attempt that ended the job stay true, and tell their news once."""
    job, _ = store.create("o", asked())
    lease = store.claim("w", lease_seconds=10)
    assert store.complete(lease, **DONE) and store.complete(lease, **DONE)
    assert len(news(store)) == 2 and store.get(job.id).attempts == 1


def test_attempts_are_counted_and_bounded(store: JobStore, clock: Clock) -> None:
    job, _ = store.create("o", asked())
    younger, _ = store.create("o", asked())
    for attempt in range(1, 6):
        lease = store.claim("w", lease_seconds=10)
        assert (lease.job.id, lease.job.attempts) == (job.id, attempt)
        clock.now += 11
    assert store.claim("w", lease_seconds=10).job.id == younger.id
    lost = store.get(job.id)
    assert lost.status == "failed" and lost.error["code"] == "worker_lost"
    says(lost.error["message"], "5 workers")
    assert [one[:2] for one in news(store)] == [("video.failed", job.id)] * 2


def test_a_worker_that_leaves_costs_no_attempt(store: JobStore) -> None:
    job, _ = store.create("o", asked())
    for _ in range(20):
        lease = store.claim("w", lease_seconds=10)
        assert lease.job.attempts == 1
        assert store.release(lease)
        assert not store.heartbeat(lease, 1) and not store.complete(lease, **DONE)
        assert store.get(job.id).status == "queued"


def test_a_reason_counts_waits_and_is_told_in_the_end(store: JobStore, clock: Clock) -> None:
    job, _ = store.create("o", asked())
    for _ in range(5):
        lease = store.claim("w", lease_seconds=10)
        assert store.release(lease, reason="the disk is full", pause=30)
        assert store.get(job.id).error is None  # what is not over has no error
        clock.now += 29
        assert store.claim("w", lease_seconds=10) is None
        clock.now += 2
    assert store.claim("w", lease_seconds=10) is None
    says(store.get(job.id).error["message"], "the disk is full", "5")


def test_a_deleted_job_is_gone_and_stops(store: JobStore) -> None:
    job, _ = store.create("o", asked(), idempotency_key="k")
    lease = store.claim("w", lease_seconds=10)
    assert not store.delete(job.id, "p") and store.get(job.id) is not None
    assert store.delete(job.id, "o") and not store.delete(job.id, "o")
    assert store.get(job.id) is None and store.page("o") == ([], False)
    assert not store.heartbeat(lease, 1) and not store.complete(lease, **DONE)
    assert not store.release(lease) and store.claim("w", lease_seconds=10) is None
    assert news(store) == [] and set(store.counts().values()) == {0}
    assert store.create("o", asked("another"), idempotency_key="k")[1]


def test_a_key_makes_one_job(store: JobStore) -> None:
    one = asked(uploads=(Upload("inputs/1/a.png", "image", "same"),))
    again = asked(uploads=(Upload("inputs/2/a.png", "image", "same"),))
    other = asked(uploads=(Upload("inputs/1/a.png", "image", "other"),))
    job, is_new = store.create("o", one, idempotency_key="k")
    assert is_new and store.create("o", again, idempotency_key="k") == (job, False)
    with refuses(KeyReused, "'k'"):
        store.create("o", other, idempotency_key="k")
    assert store.create("p", other, idempotency_key="k")[1]
    assert store.create("o", one)[1] and store.create("o", one)[1]


def test_a_key_makes_one_job_of_many_at_once(store: JobStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: store.create("o", asked(), idempotency_key="k"), range(16)))
    assert len({job.id for job, _ in made}) == 1 and sum(is_new for _, is_new in made) == 1


def test_room_is_asked_one_job_at_a_time_and_what_it_raises_undoes_the_job(store: JobStore) -> None:
    active = sql.select(sql.func.count()).where(JOBS.c.owner == "o", JOBS.c.status == "queued")

    def attempt(_: int) -> bool:
        def room(connection: sql.Connection) -> None:
            if connection.scalar(active) >= 3:
                raise Full

        try:
            return store.create("o", asked(), room=room)[1]
        except Full:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(16))) == 3
    assert len(store.page("o")[0]) == 3


def test_a_repeated_request_asks_for_no_room(store: JobStore) -> None:
    def full(_: sql.Connection) -> None:
        raise Full

    job, _ = store.create("o", asked(), idempotency_key="k")
    assert store.create("o", asked(), idempotency_key="k", room=full) == (job, False)


def test_a_completed_job_is_billed_once_and_stays_billed(store: JobStore) -> None:
    job, _ = store.create("o", asked())
    lease = store.claim("w", lease_seconds=10)
    billed = {"model": "m", "size_class": "48p", "seconds": 2.0, "cost": 0.5}
    done = {**DONE, "usage": billed}
    assert store.complete(lease, **done) and store.complete(lease, **done)
    assert store.delete(job.id, "o")
    with store.database.read() as connection:
        rows = [dict(row._mapping) for row in connection.execute(sql.select(USAGE))]
    assert rows == [{"job": job.id, "owner": "o", "at": rows[0]["at"], **billed}]


class Full(Exception):
    """There is no room."""


@pytest.mark.parametrize("ascending", [False, True])
def test_pages_are_complete_and_stable_while_jobs_are_added(store: JobStore, ascending) -> None:
    before = [store.create("o", asked())[0].id for _ in range(11)]
    store.create("p", asked())
    found, after = [], None
    while True:
        page, more = store.page("o", after=after, limit=3, ascending=ascending)
        found += [job.id for job in page]
        if not more:
            break
        after = found[-1]
        # New ones, and now and then the deletion of the one that the next page begins behind.
        before += [store.create("o", asked())[0].id] if len(before) < 15 else []
        if len(found) % 2:
            store.delete(after, "o")
    assert found == (before if ascending else before[10::-1])
    with refuses(UnknownJob, "video_x"):
        store.page("o", after="video_x")
    with refuses(UnknownJob, found[0]):
        store.page("p", after=found[0])


def test_pages_miss_nothing_that_is_committed_late(store: JobStore) -> None:
    """Someone who follows an owner's new jobs sees them all: numbers rise in the order of the commits."""
    seen, stop = [], threading.Event()
    first, _ = store.create("o", asked())

    def follow() -> None:
        after = first.id
        while True:
            last = stop.is_set()
            for job in store.page("o", after=after, limit=100, ascending=True)[0]:
                seen.append(job.id)
                after = job.id
            if last:
                return

    thread = threading.Thread(target=follow)
    thread.start()
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda _: store.create("o", asked())[0].id, range(60)))
    stop.set()
    thread.join()
    assert sorted(seen) == sorted(made)


def test_many_workers_at_once_deliver_each_job_once(store: JobStore) -> None:
    ids = [store.create("o", asked())[0].id for _ in range(24)]

    def work(name: int) -> list[str]:
        done = []
        while (lease := store.claim(str(name), lease_seconds=60)) is not None:
            assert store.heartbeat(lease, 50) and store.complete(lease, **DONE)
            done.append(lease.job.id)
        return done

    with ThreadPoolExecutor(6) as pool:
        delivered = [one for done in pool.map(work, range(6)) for one in done]
    assert sorted(delivered) == sorted(ids)
    assert all(store.get(one).attempts == 1 for one in ids)


def test_who_looks_does_not_wait_for_those_who_wait_to_write(store: JobStore) -> None:
    job, _ = store.create("o", asked())
    with ThreadPoolExecutor(41) as pool:
        with store.database.write() as connection:
            store.database.lock(connection, "owner o")
            made = [pool.submit(store.create, "o", asked()) for _ in range(40)]
            time.sleep(0.5)
            assert pool.submit(store.get, job.id).result(10) == job
        assert len({one.result(30)[0].id for one in made}) == 40


def test_characters_belong_to_their_owner(store: JobStore) -> None:
    made = store.add_character("o", "Zork", Upload("characters/a.mp4", "video", "d"))
    assert store.get_character(made.id, "o") == made
    assert store.get_character(made.id, "p") is None


def test_two_gateways_may_begin_at_once(database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: JobStore(database_url), range(4)))
    job, _ = stores[0].create("o", asked())
    assert all(one.get(job.id) == job for one in stores)
    for one in stores:
        one.database.close()


def test_a_database_that_goes_away_is_named_without_its_password_and_comes_back(
    postgres: Postgres,
) -> None:
    url = postgres.new_database().replace("postgres@", "postgres:tell-no-one@")
    store = JobStore(url)
    job, _ = store.create("o", asked())
    lease = store.claim("w", lease_seconds=60)
    postgres.kill()
    try:
        for call in (lambda: store.get(job.id), lambda: store.heartbeat(lease, 3)):
            with refuses(DatabaseAway, "127.0.0.1", "does not answer", "again") as refused:
                call()
            assert "tell-no-one" not in str(refused.value)
    finally:
        postgres.start()
    assert store.heartbeat(lease, 3) and store.complete(lease, **DONE)
    postgres.cut()
    assert store.get(job.id).status == "completed"
    store.database.close()


def test_a_database_that_is_none_is_refused(tmp_path) -> None:
    for url, fact in (("jobs.db", "sqlite:///"), ("mysql://x/y", "mysql"), ("sqlite://", "memory")):
        with refuses(UserError, fact, "postgresql:"):
            JobStore(url)
