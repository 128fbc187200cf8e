"""What a job is: what was asked, how far it is, what came of it; and what can go wrong with one."""

import hashlib
import json
import re
import secrets
from dataclasses import asdict, dataclass, field
from typing import Any

from sora_train.errors import Fault, UserError

QUEUED, IN_PROGRESS, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
CANCELLED = "cancelled"
"""Deleted by its owner: never shown again; the row stays until its files are swept, and as a place in pages."""


@dataclass(frozen=True)
class Upload:
    """A file that belongs to a job, in the file store."""

    name: str
    """Its path in the store, `inputs/<job id>/reference.png`."""
    kind: str
    """image or video."""
    digest: str = ""
    """Of its content: what tells a repeated request from another one, since names hold the job's id."""


@dataclass(frozen=True)
class Asked:
    """What a job makes; the API has checked it."""

    op: str
    """create, edit, extend or remix."""
    prompt: str
    model: str
    seconds: float
    size: tuple[int, int]
    """Width, height."""
    sampling_op: str = "t2v"
    """The operation of `sora sample`."""
    negative_prompt: str = ""
    frames: int | None = None
    fps: float | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    """None: one that follows from the job's id."""
    strength: float | None = None
    gap: tuple[int, int] | None = None
    """Frames of a video that infill makes anew."""
    frames_given: int | None = None
    """Frames taken from each video."""
    storyboard: list[dict[str, Any]] | None = None
    """Cues, as docs/generate.md writes them; files among them by their name in `uploads`."""
    adapters: tuple[str, ...] = ()
    uploads: tuple[Upload, ...] = ()
    """Images and clips given, in order."""
    source: str | None = None
    """The video that is edited, extended or remixed."""
    source_seconds: float = 0.0
    """How long it is, where the delivered video holds it too: that is `seconds` longer."""
    character: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Asked":
        tuples = {name: tuple(values[name]) for name in ("size", "adapters", "character")}
        uploads = tuple(Upload(**one) for one in values["uploads"])
        gap = tuple(values["gap"]) if values.get("gap") else None
        return cls(**{**values, **tuples, "uploads": uploads, "gap": gap})

    def fingerprint(self) -> str:
        """Equal for the same request sent twice: its files, which get names of their own each time, by their bytes."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        for one in self.uploads:
            text = text.replace(json.dumps(one.name), json.dumps(one.digest))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Job:
    """A job as its owner sees it."""

    id: str
    owner: str
    asked: Asked
    status: str
    """queued, in_progress, completed or failed."""
    progress: int
    """Percent."""
    created_at: int
    completed_at: int | None = None
    """When it completed or failed."""
    expires_at: int | None = None
    """When its files are swept."""
    error: dict[str, str] | None = None
    """code, message."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Variant (video, thumbnail, spritesheet) -> name in the file store; empty once they expired."""
    usage: dict[str, Any] = field(default_factory=dict)
    """Seconds billed, cost, model, size class."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Measured by the worker: seconds, size, fps, frames, seed, signed, watermark."""
    attempts: int = 0
    """Workers that took it so far."""

    @property
    def is_over(self) -> bool:
        return self.status in (COMPLETED, FAILED, CANCELLED)


@dataclass(frozen=True)
class Lease:
    """A job in the hands of one worker until it expires; `token` fences it off from every other attempt."""

    job: Job
    token: str
    worker: str


@dataclass(frozen=True)
class Character:
    """A clip that prompts may name."""

    id: str
    owner: str
    name: str
    upload: Upload
    created_at: int


def new_id(kind: str = "video") -> str:
    """Never guessable, never a path."""
    return f"{kind}_{secrets.token_hex(12)}"


def seed_of(job: Job) -> int:
    """The seed that was asked for, or one that is the same in every attempt."""
    if job.asked.seed is not None:
        return job.asked.seed
    return int.from_bytes(hashlib.sha256(job.id.encode()).digest()[:4])


def is_id(text: str) -> bool:
    """Whether a text that a client sent may be an id at all; what is not never reaches database or disk."""
    return re.fullmatch(r"[a-z]{1,16}_[0-9a-f]{24}", text) is not None


class KeyReused(UserError):
    """An idempotency key was used before, for another request."""


class UnknownJob(UserError):
    """There is no such job of this owner."""


class DatabaseAway(Fault):
    """The database cannot be reached or is locked; the call changed nothing, or may be made again safely."""
