"""What a backend is: something that makes the video of a job in a folder that outlives its process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from sora_train.errors import Fault, UserError
from sora_train.serving.jobs.job import Asked, Job


class BadRequest(UserError):
    """A backend cannot make what is asked; `param` names the field."""

    def __init__(self, param: str, message: str):
        super().__init__(message)
        self.param = param


class Retry(Fault):
    """The video could not be made now, and may be later: the job goes back into the queue, with this reason."""


class Cancelled(Exception):
    """`make` was told to stop and stopped."""


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say."""

    seconds: float
    size: tuple[int, int]
    """Width, height."""
    fps: float


class Backend(Protocol):
    """Makes videos; one object serves one worker, one job at a time."""

    name: str

    def models(self) -> list[str]:
        """Names that `Asked.model` may have; the first is the default."""

    def defaults(self, model: str) -> Defaults:
        """What the model was trained on."""

    def check(self, asked: Asked) -> None:
        """Called by the API before a job is stored. Raises BadRequest for what cannot be made."""

    def make(
        self,
        job: Job,
        inputs: list[Path],
        folder: Path,
        progress: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> Path:
        """The job's video, an mp4 in `folder`.

        Args:
            inputs: the files of `job.asked.uploads` in their order, then the source's video where there is one, then
                the clips of its characters.
            folder: the same for every attempt on this machine, so a killed job goes on from what lies in it.
            progress: told percents as they grow.
            cancelled: whether nobody wants the video any more; asked now and then.

        Raises:
            Cancelled: `cancelled` said so.
            Retry: not now.
            UserError: this job can never be made; the message is shown to its owner.
        """


@runtime_checkable
class Elsewhere(Protocol):
    """A backend whose videos are made by another process, which goes on when `make` stops."""

    def forget(self, folder: Path) -> None:
        """The job of this folder is over, and nobody waits for what is still made for it."""
