"""A worker: takes jobs from the database one after the other, has the backend make them, and delivers each once.

Two threads beside the one that works: one keeps the lease of the job at hand, and one sends news and sweeps files.
Whatever happens to the process, its lease ends and the job is free again; what it had made lies in the job's folder.
"""

import contextlib
import errno
import functools
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from sora_train.errors import Fault, SoraError, UserError
from sora_train.serving.backends.base import Backend, Cancelled, Elsewhere
from sora_train.serving.jobs.delivery import (
    Delivered,
    Laps,
    Refused,
    Steps,
    attempt_folder,
    deliver,
)
from sora_train.serving.jobs.files import FileStore
from sora_train.serving.jobs.job import DatabaseAway, Job, Lease, seed_of
from sora_train.serving.jobs.store import JobStore
from sora_train.serving.jobs.sweeping import sweep
from sora_train.serving.jobs.webhooks import Webhooks

log = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Pace:
    """Seconds between what a worker does again and again."""

    lease: float = 60.0
    """After so long without a word of its worker a job is free."""
    poll: float = 0.2
    retry: float = 1.0
    """Before the database is asked again that did not answer; of a job that failed for now, the first of pauses that
    double."""
    news: float = 1.0
    sweep: float = 60.0
    keep: float | None = None
    """Until the files of a completed job are swept; None: never."""


@dataclass
class Worker:
    """`run` works until `stop` is set; `work_one` does a single job."""

    store: JobStore
    files: FileStore
    backend: Backend
    work: Path
    """Folder of work in progress on this machine; what lies in it survives the process."""
    steps: Steps = Steps()
    webhooks: Webhooks | None = None
    pace: Pace = Pace()
    name: str = field(default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}")
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Work until `stop` is set; a job at hand then goes back into the queue, and goes on where it is."""
        chores = threading.Thread(target=self._chores, name="chores", daemon=True)
        chores.start()
        while not self.stop.is_set():
            try:
                worked = self.work_one()
            except DatabaseAway as error:
                log.warning("%s", error)
                self.stop.wait(self.pace.retry)
                continue
            if not worked:
                self.stop.wait(self.pace.poll)
        chores.join()

    def work_one(self) -> bool:
        """Take a job and bring it to its end; whether there was one. Raises DatabaseAway where none can be taken."""
        lease = self.store.claim(self.name, lease_seconds=self.pace.lease)
        if lease is None:
            return False
        log.info("%s: attempt %d begins", lease.job.id, lease.job.attempts)
        # A worker that stops while the database is away leaves its lease to end.
        with contextlib.suppress(Cancelled), _kept(self, lease) as hold:
            try:
                self._make_and_deliver(lease, hold)
            except Cancelled:
                self._left(lease)
            except Refused as error:
                self._end(lease, hold, error.code, str(error))
            except UserError as error:
                self._end(lease, hold, "invalid_request", self._shown(lease.job, error))
            except (Fault, OSError, MemoryError) as error:
                self._again(lease, hold, error)
            except Exception:
                log.exception("%s: internal fault", lease.job.id)
                self._end(
                    lease, hold, "server_error", "the server failed at this video; see its log"
                )
        return True

    def _make_and_deliver(self, lease: Lease, hold: "Hold") -> None:
        job, folder, laps = lease.job, self.work / lease.job.id, Laps()
        scratch = folder / lease.token
        scratch.mkdir(parents=True, exist_ok=True)
        source = self._source(job, hold)
        inputs = self._inputs(job, source, folder, hold)
        laps.end("prepared")
        video = self.backend.make(job, inputs, folder, hold.tell, lambda: hold.ended)
        laps.end("made")
        if hold.ended:
            raise Cancelled
        made = deliver(
            lease,
            video,
            scratch,
            self.files,
            self.steps,
            laps,
            seed=seed_of(job),
            parent=_parent(job, inputs),
        )
        if self._told(hold, lambda: self._completed(lease, made)):
            log.info("%s: completed: %s", job.id, laps)
            self._remove_lost_attempts(lease)
            shutil.rmtree(folder, ignore_errors=True)
        else:
            log.warning("%s: somebody else has it; what was made is dropped", job.id)
            self.files.remove(attempt_folder(lease))

    def _completed(self, lease: Lease, made: Delivered) -> bool:
        return self.store.complete(
            lease,
            outputs=made.outputs,
            facts=made.facts,
            usage=made.usage,
            keep_seconds=self.pace.keep,
        )

    def _source(self, job: Job, hold: "Hold") -> Job | None:
        """The job whose video this one is made from."""
        if job.asked.source is None:
            return None
        source_id = job.asked.source
        source = self._told(hold, lambda: self.store.get(source_id, job.owner))
        if source is None or "video" not in source.outputs:
            raise Refused("source_gone", f"the video {source_id} was deleted or has expired")
        return source

    def _inputs(self, job: Job, source: Job | None, folder: Path, hold: "Hold") -> list[Path]:
        """The files of the job, copied beside its work."""
        names = [upload.name for upload in job.asked.uploads]
        names += [source.outputs["video"]] if source else []
        for one in job.asked.character:
            ask = functools.partial(self.store.get_character, one, job.owner)
            character = self._told(hold, ask)
            if character is None:
                raise Refused("input_gone", f"there is no character {one}")
            names.append(character.upload.name)
        paths = []
        for number, name in enumerate(names):
            path = folder / "inputs" / f"{number:02d}{Path(name).suffix}"
            try:
                self.files.get(name, path)
            except FileNotFoundError:
                raise Refused(
                    "input_gone", "a file that this video is made from was deleted"
                ) from None
            paths.append(path)
        return paths

    def _remove_lost_attempts(self, lease: Lease) -> None:
        """Attempts that did not end the job may have left files."""
        own = attempt_folder(lease)
        try:
            for name in self.files.names(own.rpartition("/")[0]):
                if not name.startswith(f"{own}/"):
                    self.files.remove(name)
        except (Fault, OSError) as error:
            log.warning("%s: %s", lease.job.id, error)

    def _left(self, lease: Lease) -> None:
        """The job was cancelled, or this worker is to stop."""
        try:
            released = self.store.release(lease)
            deleted = not released and self.store.get(lease.job.id) is None
        except DatabaseAway:
            return  # its lease ends by itself
        log.info("%s: %s", lease.job.id, "given back" if released else "cancelled")
        if released:
            # Only then: the answer that this job is complete may have been lost.
            self.files.remove(attempt_folder(lease))
        elif deleted:
            self._forget(self.work / lease.job.id)

    def _forget(self, folder: Path) -> None:
        if isinstance(self.backend, Elsewhere):
            self.backend.forget(folder)

    def _end(self, lease: Lease, hold: "Hold", code: str, message: str) -> None:
        log.warning("%s: %s: %s", lease.job.id, code, message)
        self._told(hold, lambda: self.store.fail(lease, code=code, message=message))
        with contextlib.suppress(Fault, OSError):  # what remains is swept later
            self.files.remove(attempt_folder(lease))

    def _again(self, lease: Lease, hold: "Hold", error: BaseException) -> None:
        """Not now: another attempt, after a pause, if any are left."""
        job = lease.job
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        full = full or (isinstance(error.__cause__, OSError) and error.__cause__.errno in DISK_FULL)
        code = "disk_full" if full else "server_error"
        told = "the server's disk is full" if full else "the server could not make this video now"
        if job.attempts >= self.store.max_attempts:
            self._end(lease, hold, code, f"{told}, in {job.attempts} attempts")
            return
        log.warning("%s: %s: %s; tried again", job.id, code, error)
        with contextlib.suppress(Fault, OSError):
            self.files.remove(attempt_folder(lease))
        shutil.rmtree(self.work / job.id / lease.token, ignore_errors=True)
        pause = self.pace.retry * 2 ** (job.attempts - 1)
        self._told(hold, lambda: self.store.release(lease, reason=told, pause=pause))

    def _shown(self, job: Job, error: SoraError) -> str:
        """The sentence without the folders of this machine."""
        return str(error).replace(f"{self.work / job.id}{os.sep}", "").replace(str(self.work), "")

    def _told(self, hold: "Hold", ask: Callable[[], Answer]) -> Answer:
        """The database's answer, asked again until it comes. Raises Cancelled where this worker stops first."""
        while True:
            try:
                return ask()
            except DatabaseAway as error:
                log.warning("%s", error)
                if self.stop.wait(self.pace.retry):
                    raise Cancelled from error

    def _chores(self) -> None:
        """News and sweeping, whatever fails in between."""
        next_sweep = 0.0
        while True:
            last = self.stop.is_set()
            try:
                if self.webhooks is not None:
                    self.webhooks.send_due(stop=self.stop)
                if time.monotonic() >= next_sweep and not last:
                    sweep(self.store, self.files, self.work, self._forget)
                    next_sweep = time.monotonic() + self.pace.sweep
            except (Fault, OSError) as error:
                log.warning("%s", error)
            if last:
                return
            self.stop.wait(self.pace.news)


def _parent(job: Job, inputs: list[Path]) -> Path | None:
    """The video that this one is made from: one of this server, or the clip that was sent."""
    asked = job.asked
    if asked.source is not None:
        return inputs[len(asked.uploads)]
    sent = zip(asked.uploads, inputs, strict=False)
    is_made_from = asked.op in ("edit", "extend")
    return next((path for one, path in sent if is_made_from and one.kind == "video"), None)


class Hold:
    """A lease that is kept by a thread while the job is made."""

    def __init__(self, worker: Worker, lease: Lease):
        self.worker, self.lease = worker, lease
        self.lost, self.progress = False, lease.job.progress
        self._over = threading.Event()

    @property
    def ended(self) -> bool:
        """Whether the job is to be left."""
        return self.lost or self.worker.stop.is_set()

    def tell(self, progress: int) -> None:
        """Percent, which never fall and reach 100 with the delivery."""
        self.progress = max(self.progress, min(int(progress), 99))

    def keep(self) -> None:
        pace = self.worker.pace
        while not self._over.wait(min(pace.lease / 3, 1.0 + pace.lease / 30)):
            try:
                kept = self.worker.store.heartbeat(
                    self.lease, self.progress, lease_seconds=pace.lease
                )
            except DatabaseAway as error:
                log.warning("%s: %s", self.lease.job.id, error)
                continue
            if not kept and not self._over.is_set():
                self.lost = True
                return

    def end(self) -> None:
        self._over.set()


@contextlib.contextmanager
def _kept(worker: Worker, lease: Lease) -> Iterator[Hold]:
    hold = Hold(worker, lease)
    thread = threading.Thread(target=hold.keep, name="lease", daemon=True)
    thread.start()
    try:
        yield hold
    finally:
        hold.end()
        thread.join()
