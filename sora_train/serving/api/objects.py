"""The objects of answers, as OpenAI's clients read them; what is more than theirs stands behind."""

from typing import Any, Literal

import pydantic

from sora_train.serving.jobs.job import Character, Job


class _Object(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(use_attribute_docstrings=True)


class ErrorDetail(_Object):
    message: str
    """What is wrong, and what to do about it."""
    type: str
    """invalid_request_error, rate_limit_error, insufficient_quota or server_error."""
    param: str | None
    """The field it is about."""
    code: str | None
    """For programs."""


class ErrorObject(_Object):
    error: ErrorDetail


class VideoFailure(_Object):
    code: str
    message: str


class VideoObject(_Object):
    id: str
    object: Literal["video"]
    created_at: int
    """Seconds since 1970."""
    completed_at: int | None
    expires_at: int | None
    """When the files are deleted."""
    error: VideoFailure | None
    model: str
    progress: int
    """Percent."""
    prompt: str | None
    remixed_from_video_id: str | None
    seconds: str
    """Of an extension, the whole video's."""
    size: str
    """WIDTHxHEIGHT."""
    status: Literal["queued", "in_progress", "completed", "failed"]
    operation: str
    """What was done: t2v, i2v, extend, ..."""
    seed: int | None
    fps: float | None
    frames: int | None
    usage: dict[str, Any] | None
    """Seconds billed, cost, currency, model and size class, once it is completed."""
    provenance: dict[str, Any] | None
    """Whether the file is signed and has a watermark, once it is completed."""


class VideoPage(_Object):
    object: Literal["list"]
    data: list[VideoObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(_Object):
    id: str
    object: Literal["video.deleted"]
    deleted: bool


class DeletedCharacter(_Object):
    id: str
    object: Literal["character.deleted"]
    deleted: bool


class CharacterObject(_Object):
    id: str
    object: Literal["character"]
    created_at: int
    name: str


class ModelObject(_Object):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelPage(_Object):
    object: Literal["list"]
    data: list[ModelObject]


def video(job: Job) -> dict[str, Any]:
    """The object of a job: what was asked, and in its place what was measured once it is done."""
    asked, facts = job.asked, job.facts
    seconds = facts.get("seconds", asked.seconds + asked.source_seconds)
    size = facts.get("size", asked.size)
    is_done = job.status == "completed"
    error = {name: str(job.error[name]) for name in ("code", "message")} if job.error else None
    return {
        "id": job.id,
        "object": "video",
        "created_at": job.created_at,
        "completed_at": job.completed_at if is_done else None,
        "expires_at": job.expires_at,
        "error": error,
        "model": asked.model,
        "progress": job.progress,
        "prompt": asked.prompt,
        "remixed_from_video_id": asked.source if asked.op == "remix" else None,
        "seconds": f"{seconds:.6g}",
        "size": f"{int(size[0])}x{int(size[1])}",
        "status": job.status,
        "operation": asked.sampling_op,
        "seed": facts.get("seed", asked.seed),
        "fps": facts.get("fps", asked.fps),
        "frames": facts.get("frames", asked.frames),
        "usage": job.usage or None,
        "provenance": {
            "signed": bool(facts.get("signed")),
            "watermark": bool(facts.get("watermark")),
        }
        if is_done
        else None,
    }


def page(jobs: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    ids = [job["id"] for job in jobs]
    return {
        "object": "list",
        "data": jobs,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": has_more,
    }


def character(made: Character) -> dict[str, Any]:
    return {
        "id": made.id,
        "object": "character",
        "created_at": made.created_at,
        "name": made.name,
    }
