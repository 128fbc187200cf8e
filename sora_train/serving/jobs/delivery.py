"""From the video that a backend made to the files of a job: looked at, watermarked, signed, and put into the store.

Signing comes last: whatever changes the file after it breaks it.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from sora_train.errors import SoraError
from sora_train.serving.jobs.files import FileStore
from sora_train.serving.jobs.job import Job, Lease
from sora_train.serving.jobs.pictures import draw, measured

FILES = {"video": "video.mp4", "thumbnail": "thumbnail.webp", "spritesheet": "spritesheet.jpg"}


class Refused(SoraError):
    """The job fails for good; `code` and the message are for its owner."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class Judged(Protocol):
    """What a policy says of a video."""

    @property
    def allowed(self) -> bool: ...

    @property
    def category(self) -> str: ...


@dataclass(frozen=True)
class Steps:
    """What happens to a video before it is delivered; None: nothing."""

    judge: Callable[[Job, Path], Judged] | None = None
    mark: Callable[[Path, Path], None] | None = None
    """Watermarks the first file into the second."""
    sign: Callable[[Job, Path, Path, Path | None], None] | None = None
    """Signs the second file's content into the third; the last is the video it was made from."""
    bill: Callable[[Job, dict[str, Any]], dict[str, Any]] | None = None
    """The usage by the facts; None: nothing is billed."""


def folder_of(job_id: str) -> str:
    """Of a job's outputs in the store."""
    return f"outputs/{job_id}"


def attempt_folder(lease: Lease) -> str:
    """Of one attempt: files of two attempts never meet."""
    return f"{folder_of(lease.job.id)}/{lease.token}"


@dataclass(frozen=True)
class Delivered:
    outputs: dict[str, str]
    facts: dict[str, Any]
    usage: dict[str, Any]


class Laps:
    """Seconds of the parts of some work, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def end(self, name: str) -> None:
        """This part is done, and the next begins."""
        now = time.monotonic()
        self.seconds[name], self._last = now - self._last, now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.3f} s" for name, seconds in self.seconds.items())


def deliver(
    lease: Lease,
    video: Path,
    scratch: Path,
    files: FileStore,
    steps: Steps,
    laps: Laps,
    *,
    seed: int,
    parent: Path | None = None,
) -> Delivered:
    """Put the files of a job into the store, under the names of this attempt.

    Args:
        scratch: a folder that is empty.
        laps: told each part as it is done.
        parent: the video it was made from.

    Raises:
        Refused: the policy forbids the video, or it cannot be signed.
        OSError, Fault: the disk is full, or the store is away.
    """
    job = lease.job
    if steps.judge is not None:
        judged = steps.judge(job, video)
        if not judged.allowed:
            raise Refused(
                "moderation_blocked",
                "the video was made and then blocked, because it may break the usage policy"
                + (f" ({judged.category})" if judged.category else ""),
            )
    laps.end("judged")
    if steps.mark is not None:
        steps.mark(video, scratch / "marked.mp4")
        video = scratch / "marked.mp4"
    laps.end("marked")
    if steps.sign is not None:
        signed = scratch / "signed.mp4"
        try:
            steps.sign(job, video, signed, parent)
        except (SoraError, ValueError) as error:
            raise Refused("signing_failed", "the video was made and could not be signed") from error
        video = signed
    laps.end("signed")
    facts = {**asdict(measured(video)), "seed": seed}
    facts["new_seconds"] = round(max(0.0, facts["seconds"] - job.asked.source_seconds), 3)
    facts |= {"watermark": steps.mark is not None, "signed": steps.sign is not None}
    made = {"video": video} | {name: scratch / FILES[name] for name in ("thumbnail", "spritesheet")}
    draw(video, facts["frames"], made["thumbnail"], made["spritesheet"])
    outputs = {name: f"{attempt_folder(lease)}/{FILES[name]}" for name in FILES}
    for name, path in made.items():
        files.put(outputs[name], path)
    laps.end("stored")
    return Delivered(outputs, facts, steps.bill(job, facts) if steps.bill else {})
