"""The jobs in the database: created once, leased to one worker at a time, ended once.

A lease is a token in the job's row. Whatever a worker writes is written where the row still has its token, so a worker
that was thought dead, and comes back, changes nothing.
"""

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import sqlalchemy as sql

from sora_train.serving.jobs.database import Database
from sora_train.serving.jobs.job import (
    CANCELLED,
    COMPLETED,
    FAILED,
    IN_PROGRESS,
    QUEUED,
    Asked,
    Character,
    Job,
    KeyReused,
    Lease,
    UnknownJob,
    Upload,
    is_id,
    new_id,
)
from sora_train.serving.jobs.tables import CHARACTERS, JOBS, METADATA, USAGE, WEBHOOKS

MAX_ATTEMPTS = 5
LISTED = (QUEUED, IN_PROGRESS, COMPLETED, FAILED)
ACTIVE = (QUEUED, IN_PROGRESS)


class JobStore:
    """Jobs, characters and news of one database. Every method raises DatabaseAway where it cannot be reached, and may
    then be called again with the same arguments."""

    def __init__(
        self,
        url: str,
        *,
        max_attempts: int = MAX_ATTEMPTS,
        endpoints: Sequence[str | tuple[str, str]] = (),
        clock: Callable[[], float] | None = None,
    ):
        """
        Args:
            url: as `Database` takes it.
            max_attempts: workers that may be lost on a job before it fails.
            endpoints: addresses that are told when a job ends, or (address, owner) for those of one owner.
            clock: for tests.
        """
        self.database = Database(url, clock)
        self.max_attempts, self.endpoints = max_attempts, tuple(endpoints)
        self.database.create(METADATA)

    # --- what the API calls ---

    def create(
        self,
        owner: str,
        asked: Asked,
        *,
        job_id: str | None = None,
        idempotency_key: str | None = None,
        room: Callable[[sql.Connection], None] | None = None,
    ) -> tuple[Job, bool]:
        """(the job, whether it is new); the same id or key gives the job that is there.

        Args:
            room: called in the transaction, the owner locked, before a new job; what it raises undoes it.

        Raises:
            KeyReused: the key was given with another request.
        """
        job_id = job_id or new_id()
        with self.database.write() as connection:
            # Numbers of one owner rise as they are committed, and limits are checked one job at a time.
            self.database.lock(connection, f"owner {owner}")
            known = self._known(connection, owner, job_id, idempotency_key)
            if known is not None:
                if known.fingerprint != asked.fingerprint():
                    raise KeyReused(
                        f"the idempotency key {idempotency_key!r} was used for another request; give each its own"
                    )
                return _job(known), False
            if room is not None:
                room(connection)
            values = {
                "id": job_id,
                "owner": owner,
                "asked": asked.to_dict(),
                "seconds": asked.seconds,
                "status": QUEUED,
                "created_at": int(self.database.now(connection)),
                "idempotency_key": idempotency_key,
                "fingerprint": asked.fingerprint(),
            }
            connection.execute(JOBS.insert().values(values))
            return _job(_one(connection, JOBS.c.id == job_id)), True

    def _known(
        self, connection: sql.Connection, owner: str, job_id: str, key: str | None
    ) -> sql.Row[Any] | None:
        same = JOBS.c.id == job_id
        if key is not None:
            same = sql.or_(same, JOBS.c.idempotency_key == key)
        return _one(connection, sql.and_(JOBS.c.owner == owner, same))

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """None where there is none, it is somebody else's, or it was deleted."""
        if not is_id(job_id):
            return None
        with self.database.read() as connection:
            row = connection.execute(_BY_ID, {"id": job_id}).one_or_none()
        is_there = row is not None and row.status in LISTED and owner in (None, row.owner)
        return _job(row) if is_there else None

    def page(
        self, owner: str, *, after: str | None = None, limit: int = 20, ascending: bool = False
    ) -> tuple[list[Job], bool]:
        """(an owner's jobs, the newest first, whether more follow). `after` may have been deleted meanwhile.

        Raises:
            UnknownJob: `after` is no job of this owner.
        """
        wanted = [JOBS.c.owner == owner, JOBS.c.status.in_(LISTED)]
        with self.database.read() as connection:
            if after is not None:
                this = sql.and_(JOBS.c.id == after, JOBS.c.owner == owner)
                row = _one(connection, this) if is_id(after) else None
                if row is None:
                    raise UnknownJob(f"there is no video {after!r}; give the id of one as `after`")
                number = row.number
                wanted.append(JOBS.c.number > number if ascending else JOBS.c.number < number)
            order = JOBS.c.number if ascending else JOBS.c.number.desc()
            query = sql.select(JOBS).where(*wanted).order_by(order).limit(limit + 1)
            rows = connection.execute(query).all()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def delete(self, job_id: str, owner: str) -> bool:
        """Cancel and forget a job; a worker stops at its next heartbeat, and sweeps the files. False: there is none."""
        if not is_id(job_id):
            return False
        gone = {"status": CANCELLED, "idempotency_key": None, "swept": False}
        mine = JOBS.c.id == job_id, JOBS.c.owner == owner, JOBS.c.status.in_(LISTED)
        with self.database.write() as connection:
            return connection.execute(JOBS.update().where(*mine).values(gone)).rowcount == 1

    def counts(self) -> dict[str, int]:
        """Jobs by status."""
        query = sql.select(JOBS.c.status, sql.func.count()).group_by(JOBS.c.status)
        with self.database.read() as connection:
            found = {status: count for status, count in connection.execute(query)}
        return {status: found.get(status, 0) for status in LISTED}

    def add_character(
        self,
        owner: str,
        name: str,
        upload: Upload,
        *,
        room: Callable[[sql.Connection], None] | None = None,
    ) -> Character:
        """`room` is called in the transaction, the owner's characters locked; what it raises undoes it."""
        with self.database.write() as connection:
            self.database.lock(connection, f"characters of {owner}")
            if room is not None:
                room(connection)
            made = Character(
                new_id("char"), owner, name, upload, int(self.database.now(connection))
            )
            values = {**vars(made), "upload": vars(upload)}
            connection.execute(CHARACTERS.insert().values(values))
        return made

    def get_character(self, character_id: str, owner: str) -> Character | None:
        if not is_id(character_id):
            return None
        mine = CHARACTERS.c.id == character_id, CHARACTERS.c.owner == owner
        with self.database.read() as connection:
            row = connection.execute(sql.select(CHARACTERS).where(*mine)).one_or_none()
        if row is None:
            return None
        values = dict(row._mapping)
        return Character(**{**values, "upload": Upload(**values["upload"])})

    def delete_character(self, character_id: str, owner: str) -> Upload | None:
        """Forget a character; returns its file, which nothing names any more. None where there is none."""
        if not is_id(character_id):
            return None
        mine = CHARACTERS.c.id == character_id, CHARACTERS.c.owner == owner
        with self.database.write() as connection:
            gone = CHARACTERS.delete().where(*mine).returning(CHARACTERS.c.upload)
            upload = connection.execute(gone).scalar_one_or_none()
        return None if upload is None else Upload(**upload)

    # --- what workers call ---

    def claim(self, worker: str, *, lease_seconds: float) -> Lease | None:
        """The oldest job that is queued, or whose worker was not heard of for so long; None where there is none.

        A job that was lost `max_attempts` times fails here.
        """
        with self.database.read() as connection:
            # Idle workers ask often, and do not stand in the way of those who write.
            now = self.database.now(connection)
            free = JOBS.c.status.in_(ACTIVE), JOBS.c.free_at <= now
            if connection.execute(sql.select(JOBS.c.id).where(*free).limit(1)).first() is None:
                return None
        while True:
            with self.database.write() as connection:
                now = self.database.now(connection)
                query = sql.select(JOBS).where(JOBS.c.status.in_(ACTIVE), JOBS.c.free_at <= now)
                query = query.order_by(JOBS.c.number).limit(1).with_for_update(skip_locked=True)
                row = connection.execute(query).one_or_none()
                if row is None:
                    return None
                this = JOBS.c.id == row.id
                if row.attempts >= self.max_attempts:
                    self._end(connection, this, FAILED, error=_lost(row))
                    continue
                taken = {
                    "status": IN_PROGRESS,
                    "attempts": row.attempts + 1,
                    "worker": worker,
                    "token": secrets.token_hex(16),
                    "free_at": now + lease_seconds,
                }
                connection.execute(JOBS.update().where(this).values(taken))
                return Lease(_job(_one(connection, this)), taken["token"], worker)

    def heartbeat(self, lease: Lease, progress: int, *, lease_seconds: float = 60.0) -> bool:
        """Keep a lease. False: the job was cancelled, or somebody else has it; stop."""
        with self.database.write() as connection:
            kept = {
                "free_at": self.database.now(connection) + lease_seconds,
                "progress": min(max(int(progress), 0), 100),
            }
            return connection.execute(JOBS.update().where(_held(lease)).values(kept)).rowcount == 1

    def complete(
        self,
        lease: Lease,
        *,
        outputs: dict[str, str],
        facts: dict[str, Any],
        usage: dict[str, Any],
        keep_seconds: float | None = None,
    ) -> bool:
        """The job is delivered, once. False: it was cancelled, or somebody else has it.

        Args:
            keep_seconds: after which the files are swept; None: never.
        """
        with self.database.write() as connection:
            expires = None
            if keep_seconds is not None:
                expires = int(self.database.now(connection) + keep_seconds)
            made = {"outputs": outputs, "facts": facts, "usage": usage, "expires_at": expires}
            if self._ended(connection, lease, COMPLETED, progress=100, error=None, **made):
                self._bill(connection, lease.job, usage)
                return True
            return False

    def _bill(self, connection: sql.Connection, job: Job, usage: dict[str, Any]) -> None:
        """Once a job: a row that outlives it."""
        billed = sql.select(USAGE.c.job).where(USAGE.c.job == job.id)
        if "seconds" in usage and connection.execute(billed).first() is None:
            at = int(self.database.now(connection))
            columns = {name: usage[name] for name in ("model", "size_class", "seconds", "cost")}
            connection.execute(USAGE.insert().values(job=job.id, owner=job.owner, at=at, **columns))

    def fail(self, lease: Lease, *, code: str, message: str) -> bool:
        """The job failed for good. False: it was cancelled, or somebody else has it."""
        with self.database.write() as connection:
            return self._ended(connection, lease, FAILED, error={"code": code, "message": message})

    def release(self, lease: Lease, *, reason: str = "", pause: float = 0.0) -> bool:
        """Give a job back into the queue.

        Args:
            reason: why the attempt came to nothing, which counts; without one the worker just leaves.
            pause: seconds until it may be taken again.
        """
        with self.database.write() as connection:
            back: dict[str, Any] = {"status": QUEUED, "worker": None, "token": None}
            back["free_at"] = self.database.now(connection) + pause
            if reason:
                back["error"] = {"code": "retried", "message": reason}
            else:
                back["attempts"] = JOBS.c.attempts - 1
            return connection.execute(JOBS.update().where(_held(lease)).values(back)).rowcount == 1

    def _ended(self, connection: sql.Connection, lease: Lease, status: str, **values: Any) -> bool:
        if self._end(connection, _held(lease), status, **values):
            return True
        # Asked again after an answer that was lost on its way.
        own = sql.and_(JOBS.c.id == lease.job.id, JOBS.c.token == lease.token)
        return _one(connection, sql.and_(own, JOBS.c.status == status)) is not None

    def _end(
        self, connection: sql.Connection, which: sql.ColumnElement[bool], status: str, **values: Any
    ) -> bool:
        """End a job and note the news of it, in one transaction."""
        now = int(self.database.now(connection))
        ended = JOBS.update().where(which).values(status=status, completed_at=now, **values)
        row = connection.execute(ended.returning(JOBS.c.id, JOBS.c.owner)).one_or_none()
        if row is None:
            return False
        news = {"event": new_id("evt"), "type": f"video.{status}", "job": row.id}
        times = {"created_at": now, "due": float(now)}
        for told in self.endpoints:
            endpoint, owner = (told, row.owner) if isinstance(told, str) else told
            if owner != row.owner:
                continue
            connection.execute(WEBHOOKS.insert().values(**news, **times, endpoint=endpoint))
        return True


# Built once: clients that wait ask for nothing else.
_BY_ID = sql.select(JOBS).where(JOBS.c.id == sql.bindparam("id"))


def _held(lease: Lease) -> sql.ColumnElement[bool]:
    """The job is still in the hands of this attempt."""
    return sql.and_(
        JOBS.c.id == lease.job.id, JOBS.c.token == lease.token, JOBS.c.status == IN_PROGRESS
    )


def _one(connection: sql.Connection, which: sql.ColumnElement[bool]) -> Any:
    return connection.execute(sql.select(JOBS).where(which)).one_or_none()


def _lost(row: Any) -> dict[str, str]:
    last = f"; the last said: {row.error['message']}" if row.error else ""
    return {
        "code": "worker_lost",
        "message": f"{row.attempts} workers took this job and none finished it{last}",
    }


def _job(row: Any) -> Job:
    names = set(Job.__dataclass_fields__)
    values = {name: value for name, value in row._mapping.items() if name in names}
    error = None if row.status in ACTIVE else row.error
    return Job(**{**values, "asked": Asked.from_dict(row.asked), "error": error})
