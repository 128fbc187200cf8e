"""A worker of our own sampler as a process, for tests that kill it: DATABASE FILES WORK CKPT."""

import logging
import signal
import sys
from pathlib import Path

from sora_train.serving.backends.local import LocalBackend
from sora_train.serving.jobs.files import FileStore
from sora_train.serving.jobs.store import JobStore
from sora_train.serving.jobs.worker import Pace, Worker

if __name__ == "__main__":
    database, files, work, ckpt = sys.argv[1:]
    logging.basicConfig(level=logging.INFO)
    pace = Pace(lease=4.0, poll=0.05, retry=0.2, sweep=0.5)
    backend = LocalBackend(ckpt, names=["tiny"])
    worker = Worker(JobStore(database), FileStore(files), backend, Path(work), pace=pace)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop.set())
    worker.run()
