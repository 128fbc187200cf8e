"""A backend that makes real mp4 files at once, and a server around it whose jobs end when the test says so."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from sora_train.data.decode.video_io import encode_h264, open_h264
from sora_train.serving.api.app import build_app
from sora_train.serving.backends.base import BadRequest, Defaults
from sora_train.serving.jobs.delivery import Steps
from sora_train.serving.jobs.job import Asked, Job
from sora_train.serving.jobs.worker import Pace, Worker
from sora_train.serving.service import Service
from sora_train.serving.settings import Settings

HOME = "http://127.0.0.1:8000"
PRICES = [
    {"model": "tiny", "up_to": 48, "per_second": 0.1},
    {"model": "tiny", "up_to": 720, "per_second": 0.5},
]


def write_clip(
    path: Path, frames: int = 16, size: tuple[int, int] = (64, 48), fps: float = 8
) -> Path:
    width, height = size
    with open_h264(path, fps) as write:
        for number in range(frames):
            write(np.full((height, width, 3), 10 * number % 256, np.uint8))
    return path


def clip(frames: int = 16, size: tuple[int, int] = (64, 48), fps: float = 8) -> bytes:
    """An mp4 of shades of grey."""
    buffer = io.BytesIO()
    shades = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 10
    encode_h264(np.broadcast_to(shades, (frames, size[1], size[0], 3)), fps, buffer)
    return buffer.getvalue()


def picture(size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


class StubBackend:
    """Makes grey clips; refuses a guidance scale of 13."""

    name = "stub"

    def models(self) -> list[str]:
        return ["tiny", "other"]

    def defaults(self, model: str) -> Defaults:
        return Defaults(4.0, (64, 48), 8.0)

    def check(self, asked: Asked) -> None:
        if asked.guidance_scale == 13:
            raise BadRequest("guidance_scale", "guidance_scale 13 is unlucky; choose another")

    def make(
        self,
        job: Job,
        inputs: list[Path],
        folder: Path,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> Path:
        asked = job.asked
        frames = round((asked.seconds + asked.source_seconds) * 8)
        return write_clip(folder / "made.mp4", frames, asked.size)


class Server:
    """The app of a service, a client of it, and its jobs in hand."""

    def __init__(self, folder: Path, **settings):
        given = {"data": str(folder), "prices": PRICES, **settings}
        self.service = Service.open(Settings.model_validate(given), StubBackend())
        self.fetched: dict[str, bytes] = {}
        """What `image_url` leads to."""
        self.app = build_app(self.service, fetch=self._fetch)
        self.http = TestClient(self.app, base_url=HOME)

    def _fetch(self, url: str) -> bytes:
        from sora_train.serving.safety.remote_images import BadImageUrl, RemoteImages

        if url in self.fetched:
            return self.fetched[url]
        if url.startswith("data:"):
            return RemoteImages().fetch(url)
        raise BadImageUrl(f"image_url={url[:80]} gave no picture; check the address")

    def key(self, name: str = "test", **limits) -> str:
        return self.service.keys.add(name, **limits)[1]

    def as_(self, key: str) -> TestClient:
        """A client that sends this key."""
        return TestClient(self.app, base_url=HOME, headers={"Authorization": f"Bearer {key}"})

    def work(self) -> Job | None:
        """Bring the oldest job to its end as a worker does."""
        service = self.service
        waiting = [
            job
            for job in service.store.page("local", ascending=True, limit=100)[0]
            if not job.is_over
        ]
        steps = Steps(bill=service.prices.usage)
        folder = service.settings.folder / "work"
        pace = Pace(keep=3600.0)
        worker = Worker(
            service.store, service.files, service.backend, folder, steps=steps, pace=pace
        )
        did = worker.work_one()
        return service.store.get(waiting[0].id) if did and waiting else None

    def work_all(self) -> None:
        while any(self.service.store.counts()[name] for name in ("queued", "in_progress")):
            self.work()
