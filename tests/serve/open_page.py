"""A browser on the playground of a real server, whose backend works as fast as the test lets it."""

import contextlib
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import uvicorn
from stub_backend import PRICES, StubBackend

from sora_train.data.decode.video_io import open_h264
from sora_train.serving.api.app import build_app
from sora_train.serving.backends.base import Cancelled
from sora_train.serving.jobs.delivery import Steps
from sora_train.serving.jobs.job import Job
from sora_train.serving.jobs.worker import Pace, Worker
from sora_train.serving.service import Service
from sora_train.serving.settings import Settings

CHROMIUM = shutil.which("chromium")
LONG_SECONDS = 30.0
"""A test that waits longer than this for the page has found a fault."""


def missing() -> str:
    """Why no browser can be driven here; empty where one can."""
    return "" if CHROMIUM else "no chromium on the PATH; docker/install.sh browser brings it"


class GatedBackend(StubBackend):
    """Makes a disc that moves over a sky, a quarter at each `go`; `fail`: why the next video cannot be made."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.inputs: list[Path] = []
        self.fail: Exception | None = None

    def go(self, quarters: int = 4) -> None:
        self.gate.release(quarters)

    def make(
        self,
        job: Job,
        inputs: list[Path],
        folder: Path,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> Path:
        self.inputs = inputs
        for quarter in range(4):
            progress(25 * quarter)
            while not self.gate.acquire(timeout=0.05):
                if cancelled():
                    raise Cancelled
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        frames = round((job.asked.seconds + job.asked.source_seconds) * 8)
        return moving_disc(folder / "made.mp4", frames, job.asked.size)


def moving_disc(path: Path, frames: int, size: tuple[int, int]) -> Path:
    width, height = size
    rows, columns = np.mgrid[:height, :width]
    sky = np.stack([40 + 60 * rows / height, 70 + 90 * rows / height, 150 - 40 * rows / height], 2)
    with open_h264(path, 8) as write:
        for number in range(frames):
            x = width * (0.15 + 0.7 * number / max(1, frames - 1))
            y = height * (0.55 - 0.2 * np.sin(np.pi * number / max(1, frames - 1)))
            disc = (columns - x) ** 2 + (rows - y) ** 2 < (0.14 * height) ** 2
            write(np.where(disc[..., None], [250, 214, 120], sky).astype(np.uint8))
    return path


class Site:
    """A server in a thread, its worker in another."""

    def __init__(self, folder: Path, **settings):
        given = {"data": str(folder), "prices": PRICES, "poll_ms": 50, **settings}
        self.backend = GatedBackend()
        self.service = Service.open(Settings.model_validate(given), self.backend)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.home = f"http://127.0.0.1:{self.listener.getsockname()[1]}/"
        config = uvicorn.Config(build_app(self.service), log_level="error", lifespan="off")
        self.http = uvicorn.Server(config)
        self.worker = Worker(
            self.service.store,
            self.service.files,
            self.backend,
            folder / "work",
            Steps(
                mark=shutil.copyfile,
                sign=lambda job, source, target, parent: shutil.copyfile(source, target),
                bill=self.service.prices.usage,
            ),
            pace=Pace(poll=0.05, keep=3600),
        )
        self.threads = [
            threading.Thread(target=self.http.run, kwargs={"sockets": [self.listener]}),
            threading.Thread(target=self.worker.run),
        ]

    @contextlib.contextmanager
    def running(self) -> Iterator["Site"]:
        for thread in self.threads:
            thread.start()
        try:
            yield self
        finally:
            self.http.should_exit = True
            self.worker.stop.set()
            for thread in self.threads:
                thread.join(LONG_SECONDS)
            self.service.store.database.close()

    def jobs(self, owner: str = "local") -> list[Job]:
        """The newest first."""
        return self.service.store.page(owner, limit=100)[0]


def codec_of(path: Path) -> str:
    with av.open(str(path)) as container:
        return str(container.streams.video[0].codec_context.name)
