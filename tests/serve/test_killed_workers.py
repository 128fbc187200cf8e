"""Real workers, really killed: the video of the next one is the undisturbed one, and made from its last window on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sora_train.serving.backends.local import LocalBackend
from sora_train.serving.jobs.files import FileStore
from sora_train.serving.jobs.job import Asked
from sora_train.serving.jobs.store import JobStore
from sora_train.serving.jobs.worker import Worker

WORKER = Path(__file__).with_name("worker_process.py")
LONG = Asked("create", "a red ring", "tiny", 12.0, (32, 32), steps=2, seed=5)


class Service:
    """A database, a store of files, and processes that work on them."""

    def __init__(self, url: str, folder: Path, ckpt: Path):
        self.folder, self.ckpt = folder, ckpt
        self.url = url
        self.store, self.files = JobStore(url), FileStore(folder / "files")

    @contextlib.contextmanager
    def worker(self) -> Iterator[subprocess.Popen]:
        words = [self.url, self.folder / "files", self.folder / "work", self.ckpt]
        process = subprocess.Popen([sys.executable, WORKER, *map(str, words)])
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)

    def windows(self, job_id: str) -> dict[Path, int]:
        """Finished ones of a job, and when they were made."""
        found = (self.folder / "work" / job_id).glob(".unfinished-*/*.npy")
        return {path: path.stat().st_mtime_ns for path in found}


class Watching(LocalBackend):
    """Counts the steps of the sampler, a number a job."""

    def make(self, job, inputs, folder, progress, cancelled) -> Path:
        self.steps = [*getattr(self, "steps", []), -1]

        def asked() -> bool:
            self.steps[-1] += 1  # once before the first step
            return cancelled()

        return super().make(job, inputs, folder, progress, asked)


def until(true: Callable[[], object], process: subprocess.Popen, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, "the worker ended by itself"
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def test_the_next_worker_goes_on_from_the_last_window(
    database_url: str, tmp_path: Path, finished_run: Path
) -> None:
    """One is killed, the next told to leave, the third ends the job."""
    service = Service(database_url, tmp_path, finished_run)
    job, _ = service.store.create("o", LONG)
    with service.worker() as process:
        until(lambda: len(service.windows(job.id)) >= 3, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    killed = service.windows(job.id)
    assert len(killed) >= 3 and service.store.get(job.id).status == "in_progress"
    with service.worker() as process:
        until(lambda: len(service.windows(job.id)) > len(killed), process)
        process.terminate()
        assert process.wait(60) == 0
    left = service.windows(job.id)
    assert {path: left[path] for path in killed} == killed, "no window is made twice"
    assert service.store.get(job.id).status == "queued" and not service.files.names("outputs")

    backend = Watching(str(finished_run), names=["tiny"])
    worker = Worker(service.store, service.files, backend, tmp_path / "work")
    assert worker.work_one()
    undisturbed, _ = service.store.create("o", LONG)
    assert worker.work_one()
    jobs = [service.store.get(one.id) for one in (job, undisturbed)]
    assert [(one.status, one.attempts) for one in jobs] == [("completed", 2), ("completed", 1)]
    # Steps of all windows, less those of the windows that were there.
    assert backend.steps[0] == backend.steps[1] - LONG.steps * len(left)
    one, other = (service.files.local(one.outputs["video"]).read_bytes() for one in jobs)
    assert one == other
    for one in jobs:
        assert service.files.names(f"outputs/{one.id}") == sorted(one.outputs.values())
        assert one.facts["seconds"] == LONG.seconds
    assert not list((tmp_path / "work").iterdir())
    service.store.database.close()
