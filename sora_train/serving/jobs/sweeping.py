"""Files that nobody needs any more: of deleted, expired and failed jobs, and work in progress of jobs that are over."""

import shutil
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sql

from sora_train.serving.jobs.delivery import folder_of
from sora_train.serving.jobs.files import FileStore
from sora_train.serving.jobs.job import CANCELLED, COMPLETED, FAILED
from sora_train.serving.jobs.store import JobStore
from sora_train.serving.jobs.tables import JOBS

AT_ONCE = 100


def sweep(
    store: JobStore,
    files: FileStore,
    work: Path,
    forget: Callable[[Path], None] = lambda folder: None,
) -> int:
    """Remove such files; returns of how many jobs. Raises DatabaseAway, or Fault where the store is away.

    Args:
        work: the folder of this machine's work in progress, one folder a job.
        forget: told of such a folder before it is gone.
    """
    swept = _due(store)
    for job_id in swept:
        files.remove(f"inputs/{job_id}")
        files.remove(folder_of(job_id))
        _noted(store, job_id)
    for folder in work.iterdir() if work.is_dir() else []:
        job = store.get(folder.name)
        if job is None or job.is_over:
            forget(folder)
            shutil.rmtree(folder, ignore_errors=True)
    return len(swept)


def _due(store: JobStore) -> list[str]:
    with store.database.read() as connection:
        now = store.database.now(connection)
        # Until its lease is over, a worker that was not told yet may put files.
        over = JOBS.c.status.in_((CANCELLED, FAILED)) & (JOBS.c.free_at <= now)
        expired = (JOBS.c.status == COMPLETED) & (JOBS.c.expires_at <= now)
        query = sql.select(JOBS.c.id).where(sql.not_(JOBS.c.swept), over | expired).limit(AT_ONCE)
        return list(connection.execute(query).scalars())


def _noted(store: JobStore, job_id: str) -> None:
    """The row stays as a place in pages and for its cost; of a deleted job nothing says what was asked."""
    this = JOBS.c.id == job_id
    with store.database.write() as connection:
        connection.execute(JOBS.update().where(this).values(swept=True, outputs={}))
        row = connection.execute(sql.select(JOBS.c.status, JOBS.c.asked).where(this)).one()
        if row.status == CANCELLED:
            asked = {**row.asked, "prompt": "", "negative_prompt": "", "storyboard": None}
            asked["uploads"] = []
            connection.execute(JOBS.update().where(this).values(asked=asked))
