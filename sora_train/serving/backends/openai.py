"""Jobs made by another server that speaks `/v1/videos`, which may forget them, stall, or be away for a while.

The other server's id of a job lies in the job's folder, so that whoever takes the job next asks for the same video and
does not have it made twice.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sora_train.base.chat import key_in
from sora_train.base.files import read_json, renamed_when_whole, write_atomically
from sora_train.serving.backends.base import Cancelled, Defaults, Retry
from sora_train.serving.backends.dialects import (
    DIALECTS,
    Dialect,
    Written,
    check_any,
    told_apart,
)
from sora_train.serving.backends.upstream import (
    Away,
    Declined,
    Gone,
    Theirs,
    TooLarge,
    Upstream,
    upstream_root,
)
from sora_train.serving.errors import Unavailable
from sora_train.serving.jobs.delivery import Refused
from sora_train.serving.jobs.job import Asked, Job, seed_of
from sora_train.serving.settings import BackendSettings

log = logging.getLogger(__name__)

VIDEO, NOTE = "video.mp4", "upstream.json"
FAILED = "backend_failed"
"""Code of a job that the other server did not make."""
GONE_AFTER = 3
"""Times in a row that a video must be unknown: of several servers behind one address, just one knows it."""
SUBMISSIONS = 5
"""Most requests for one job that may each have begun a video."""
DELETIONS = 3
LOOK_SECONDS = 5.0
"""Within which it must say what it is while a request waits, and how long it is left alone where it did not."""
LONGEST_PAUSE = 30.0
STEP = 0.2
"""Seconds between two looks whether the job is still wanted."""
USUAL = (4.0, (720, 1280))
"""Seconds, and size, of OpenAI's requests that name none."""


class OpenAIBackend:
    """`forget` is for jobs that were deleted: `make` leaves the other server's video alone when it stops, since a
    worker that stops gives its job back."""

    name = "openai"

    def __init__(self, settings: BackendSettings):
        """Raises UserError for an address that is none, or a key that is not there."""
        self.settings = settings
        self.upstream = Upstream(
            upstream_root(settings.url),
            key_in(settings.key_env, f"backend.key_env={settings.key_env}"),
            settings.answer_seconds,
            settings.download_seconds,
            settings.download_bytes,
        )
        short = min(LOOK_SECONDS, settings.answer_seconds)
        self._short = replace(self.upstream, answer_seconds=short)
        self._dialect = DIALECTS.get(settings.dialect)
        self._looked = -LOOK_SECONDS
        self._models = list(dict.fromkeys(settings.names.values()))

    def models(self) -> list[str]:
        """Those of `backend.names`, or of the other server. Raises Unavailable where it never told."""
        if not self._models:
            try:
                self._models = [name for name, _ in self._short.models()]
            except (Away, Gone) as error:
                log.warning("%s: %s", self.upstream.root, error)
        if not self._models:
            raise Unavailable("The model's server is away; try again later.", retry_after=10)
        return self._models

    def defaults(self, model: str) -> Defaults:
        return Defaults(*USUAL, self.settings.fps)

    def check(self, asked: Asked) -> None:
        """Raises BadRequest. While nobody knows which server it is, what all refuse is refused; `make` looks again."""
        check_any(asked)
        if self._dialect is None and time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            self.dialect().check(asked)
        except (Away, Retry) as error:
            log.warning("%s: %s", self.upstream.root, error)

    def dialect(self) -> Dialect:
        """Raises Away where the server does not answer, Retry where it is not known."""
        if self._dialect is None:
            paths, models = self._short.paths(), []
            try:
                models = self._short.models()
            except (Away, Gone):
                log.info("%s lists no models", self.upstream.root)
            found = told_apart(paths, models[0][1] if models else "")
            if found is None:
                raise Retry(
                    f"backend.dialect=auto: {self.upstream.root} does not tell what it is; set one of "
                    f"{', '.join(DIALECTS)}"
                )
            log.info("%s speaks %s", self.upstream.root, found.name)
            self._dialect = found
        return self._dialect

    def make(
        self,
        job: Job,
        inputs: list[Path],
        folder: Path,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> Path:
        """The video, downloaded whole. Raises Cancelled, Retry, BadRequest, and Refused with the reason."""
        return _Course(self, job, inputs, folder, progress, cancelled).video()

    def forget(self, folder: Path) -> None:
        """Have the other server stop what it makes for the job of this folder, if it makes anything."""
        note = _Note.read(folder, self.upstream.root)
        if note.id:
            self.delete(note.id, DELETIONS)

    def delete(self, video_id: str, tries: int = 1) -> None:
        """Have the other server stop and forget a video; where it does not listen, it keeps it."""
        for again in range(tries):
            try:
                self._short.delete(video_id)
                return
            except Gone:
                return
            except Away as error:
                log.warning("%s is not deleted: %s", video_id, error)
                if again + 1 < tries:
                    time.sleep(min(self.settings.poll_seconds, LONGEST_PAUSE))


@dataclass
class _Note:
    """What lies in the job's folder of the other server's video."""

    server: str
    id: str = ""
    accepted: float = 0.0
    """When, by the clock of the wall."""
    lost: int = 0
    """Videos that the other server forgot."""
    unsure: int = 0
    """Requests that nobody knows the outcome of."""

    @classmethod
    def read(cls, folder: Path, server: str) -> "_Note":
        value = read_json(folder / NOTE)
        if (
            value is None
            or value.get("server") != server
            or set(value) != set(cls(server).__dict__)
        ):
            return cls(server)
        return cls(**value)

    def write(self, folder: Path) -> None:
        write_atomically(folder / NOTE, json.dumps(asdict(self)))


class _Course:
    """One attempt at one job."""

    def __init__(
        self,
        backend: OpenAIBackend,
        job: Job,
        inputs: list[Path],
        folder: Path,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
    ):
        self.backend, self.upstream, self.settings = backend, backend.upstream, backend.settings
        self.job, self.folder, self.progress, self.cancelled = job, folder, progress, cancelled
        self.images = inputs[: len(job.asked.uploads)]
        self.note = _Note.read(folder, self.upstream.root)
        self._told = job.progress
        self._trouble_began: float | None = None
        self._pause = self.settings.poll_seconds

    def video(self) -> Path:
        target = self.folder / VIDEO
        while not target.exists():  # it gets its name when it is whole
            if not self.note.id:
                self._submit()
            if self._completed():
                self._download(target)
        if self.note.id:
            self.backend.delete(self.note.id)
        return target

    def _submit(self) -> None:
        """Have the video begun; its id is then in the note. Raises Cancelled, Retry, Refused."""
        request = self._request()
        while True:
            self._require_wanted()
            if self.note.lost + self.note.unsure >= SUBMISSIONS:
                raise Refused(FAILED, f"the model's server lost this video {SUBMISSIONS} times")
            try:
                theirs = self.upstream.create(request, f"{self.job.id}-{self.note.lost}")
            except Declined as error:
                raise Refused(FAILED, f"the model's server refuses this: {error}") from None
            except Away as error:
                if error.unsure:
                    self.note.unsure += 1
                    self.note.write(self.folder)
                self._wait_out(error)
                continue
            self._trouble_is_over()
            self.note.id, self.note.accepted = theirs.id, time.time()
            self.note.write(self.folder)
            return

    def _request(self) -> Written:
        """As the other server wants it. Raises Cancelled, Retry, BadRequest."""
        asked = self.job.asked
        while True:
            self._require_wanted()
            try:
                dialect = self.backend.dialect()
            except Away as error:
                self._wait_out(error)
                continue
            dialect.check(asked)
            image = self.images[0] if self.images else None
            return dialect.written(asked, self.settings.fps, seed_of(self.job), image)

    def _completed(self) -> bool:
        """Wait for the video. False: the other server has forgotten it. Raises Cancelled, Retry, Refused."""
        unknown = 0
        while True:
            self._require_wanted()
            try:
                theirs = self.upstream.get(self.note.id)
            except Gone:
                unknown += 1
                if unknown >= GONE_AFTER:
                    self._lost()
                    return False
            except Away as error:
                self._wait_out(error)
                continue
            else:
                unknown = 0
                self._trouble_is_over()
                if theirs.status == "completed":
                    return True
                self._require_hope(theirs)
                self._tell(theirs.progress)
            self._sleep(self.settings.poll_seconds)

    def _require_hope(self, theirs: Theirs) -> None:
        """Raises Refused for a video that failed, or that takes too long."""
        if theirs.status == "failed":
            self.backend.delete(theirs.id)
            why = theirs.error or "it does not say why"
            raise Refused(FAILED, f"the model's server failed: {why}")
        if time.time() - self.note.accepted > self.settings.job_seconds:
            self.backend.delete(theirs.id)
            raise Refused(
                FAILED,
                f"the model's server did not complete this video within {self.settings.job_seconds:g} s; its last "
                f"status was {theirs.status!r:.80}",
            )

    def _tell(self, percent: int) -> None:
        """Percents grow, whatever the other server says."""
        if self._told < percent < 100:
            self._told = percent
            self.progress(percent)

    def _download(self, target: Path) -> None:
        """The video under its name, or a note that it is lost. Raises Cancelled, Retry, Refused."""
        missing = 0
        while True:
            self._require_wanted()
            try:
                with renamed_when_whole(target) as partial:
                    self.upstream.content(self.note.id, partial)
                return
            except Gone:
                missing += 1
                if missing >= GONE_AFTER:
                    self.backend.delete(self.note.id)
                    self._lost()
                    return
                self._sleep(self.settings.poll_seconds)
            except TooLarge:
                self.backend.delete(self.note.id)
                raise Refused(
                    FAILED,
                    f"the video is larger than {self.settings.download_bytes >> 20} MiB; ask for a shorter or a "
                    "smaller one",
                ) from None
            except Away as error:
                self._wait_out(error)

    def _lost(self) -> None:
        log.warning("%s: the other server forgot %s; it is asked again", self.job.id, self.note.id)
        self.note.id, self.note.lost = "", self.note.lost + 1
        self.note.write(self.folder)

    # --- waiting ---

    def _wait_out(self, error: Away) -> None:
        """Wait, longer each time. Raises Retry where the trouble has lasted for too long."""
        now = time.monotonic()
        if self._trouble_began is None:
            self._trouble_began = now
            log.warning("%s: %s: %s", self.job.id, self.upstream.root, error)
        left = self._trouble_began + self.settings.patience_seconds - now
        if left <= 0:
            raise Retry(
                f"{self.upstream.root} is in trouble for {self.settings.patience_seconds:g} s: {error}"
            )
        self._sleep(min(max(self._pause, error.wait), left))
        self._pause = min(2 * self._pause, max(LONGEST_PAUSE, self.settings.poll_seconds))

    def _trouble_is_over(self) -> None:
        self._trouble_began, self._pause = None, self.settings.poll_seconds

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._require_wanted()
            time.sleep(min(left, STEP))

    def _require_wanted(self) -> None:
        if self.cancelled():
            raise Cancelled
