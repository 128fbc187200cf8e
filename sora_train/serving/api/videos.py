"""The routes of `/v1/videos`, `/v1/models` and characters."""

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sora_train.serving.access.callers import Caller, Callers
from sora_train.serving.api import objects
from sora_train.serving.api.asking import Asking, Wanted, no_video
from sora_train.serving.api.bodies import Body, read_body
from sora_train.serving.api.content import content
from sora_train.serving.api.described import CONFLICT, ERRORS, NOT_FOUND, body_of
from sora_train.serving.api.fields import (
    CharacterFields,
    CreateFields,
    EditFields,
    ExtendFields,
    Fields,
    RemixFields,
    read_fields,
)
from sora_train.serving.api.submitting import Submitting
from sora_train.serving.api.uploads import Arrivals
from sora_train.serving.errors import BadRequest, NotFound
from sora_train.serving.jobs.job import Job
from sora_train.serving.service import Service

_ID = re.compile(r"(video|char)_[0-9a-f]{24}", re.ASCII)
_IDEMPOTENCY = re.compile(r"[!-~]{1,255}", re.ASCII)
MAKING = 16
"""Requests whose files are fetched and looked at, which may take minutes; the others' threads are not theirs."""
Done = TypeVar("Done")
Ask = Callable[[Asking, Any, Body], Wanted]


class Videos:
    """The handlers; each is one route of `router`."""

    def __init__(self, service: Service, fetch: Callable[[str], bytes]):
        self.service, self.fetch = service, fetch
        self.callers, self.submitting = Callers(service), Submitting(service)
        self.arrivals = Arrivals(service.settings.folder / "incoming")
        self._workshop = ThreadPoolExecutor(MAKING, "making")

    # --- making ---

    async def make(self, request: Request, caller: Caller, cls: type[Fields], ask: Ask) -> Response:
        """Read a body, ask for its video, and answer with the job."""
        key = self._idempotency_key(request)
        body = await read_body(request, self.service.settings.limits.json_bytes)

        def work() -> Job:
            fields = read_fields(cls, body)
            with self.arrivals.visit() as visit:
                asking = Asking(self.service, caller.owner, visit, self.fetch)
                return self.submitting.video(caller, ask(asking, fields, body), key)

        return self.shown(await self._worked(work))

    async def _worked(self, work: Callable[[], Done]) -> Done:
        return await asyncio.get_running_loop().run_in_executor(self._workshop, work)

    async def make_character(self, request: Request, caller: Caller) -> Response:
        body = await read_body(request, self.service.settings.limits.json_bytes)

        def work() -> dict[str, Any]:
            fields, files = read_fields(CharacterFields, body), body.files.get("video", [])
            if len(files) != 1:
                raise BadRequest("video", "'video' must be one file.", "missing_required_parameter")
            with self.arrivals.visit() as visit:
                clip = visit.take(files[0].file, "video")
                if clip.kind != "video":
                    raise BadRequest("video", "'video' is an image; send a video.", "invalid_file")
                return objects.character(self.submitting.character(caller, fields.name, clip))

        return JSONResponse(await self._worked(work))

    def _idempotency_key(self, request: Request) -> str | None:
        key = request.headers.get("idempotency-key")
        if key is not None and not _IDEMPOTENCY.fullmatch(key):
            raise BadRequest(
                "Idempotency-Key", "The Idempotency-Key must be 1 to 255 visible ASCII characters."
            )
        return key

    # --- looking ---

    def job(self, video_id: str, caller: Caller) -> Job:
        """Raises NotFound: never was, deleted, or somebody else's."""
        job = self.service.store.get(video_id, caller.owner) if _ID.fullmatch(video_id) else None
        if job is None:
            raise no_video(video_id)
        return job

    def shown(self, job: Job) -> Response:
        headers = (
            {} if job.is_over else {"openai-poll-after-ms": str(self.service.settings.poll_ms)}
        )
        return JSONResponse(objects.video(job), headers=headers)

    def listed(self, caller: Caller, after: str | None, limit: int, order: str) -> Response:
        jobs, more = self.service.store.page(
            caller.owner, after=after, limit=limit, ascending=order == "asc"
        )
        return JSONResponse(objects.page([objects.video(job) for job in jobs], more))

    def deleted(self, video_id: str, caller: Caller) -> Response:
        if not _ID.fullmatch(video_id) or not self.submitting.delete(caller, video_id):
            raise no_video(video_id)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    def character(self, character_id: str, caller: Caller) -> Response:
        is_id = _ID.fullmatch(character_id)
        found = self.service.store.get_character(character_id, caller.owner) if is_id else None
        if found is None:
            raise _no_character()
        return JSONResponse(objects.character(found))

    def deleted_character(self, character_id: str, caller: Caller) -> Response:
        if not self.submitting.delete_character(caller, character_id):
            raise _no_character()
        return JSONResponse({"id": character_id, "object": "character.deleted", "deleted": True})

    def models(self) -> dict[str, Any]:
        names = [*self.service.settings.backend.names, *self.service.backend.models()]
        rows = [
            {"id": name, "object": "model", "created": 0, "owned_by": "sora_train"}
            for name in names
        ]
        return {"object": "list", "data": rows}


def _no_character() -> NotFound:
    return NotFound("There is no character with this id.", param="character_id")


def routes(service: Service, fetch: Callable[[str], bytes]) -> APIRouter:
    """All of them."""
    videos, router = Videos(service, fetch), APIRouter(prefix="/v1", responses=ERRORS)
    _makers(router, videos)
    _lists(router, videos)
    _one(router, videos)
    return router


def _lists(router: APIRouter, videos: Videos) -> None:
    Looking = Annotated[Caller, Depends(videos.callers.looking)]

    @router.get("/videos", response_model=objects.VideoPage, tags=["videos"])
    def list_videos(
        caller: Looking,
        after: Annotated[
            str | None,
            Query(max_length=100, description="Id of the last video of the page before."),
        ] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """The caller's videos, the newest first."""
        return videos.listed(caller, after, limit, order)

    @router.get(
        "/videos/characters/{character_id}",
        response_model=objects.CharacterObject,
        responses=NOT_FOUND,
        tags=["characters"],
    )
    def get_character(character_id: str, caller: Looking) -> Response:
        """A character."""
        return videos.character(character_id, caller)

    @router.delete(
        "/videos/characters/{character_id}",
        response_model=objects.DeletedCharacter,
        responses=NOT_FOUND,
        tags=["characters"],
    )
    def delete_character(character_id: str, caller: Looking) -> Response:
        """Delete a character and its clip."""
        return videos.deleted_character(character_id, caller)

    @router.get("/models", response_model=objects.ModelPage, tags=["models"])
    def list_models(caller: Looking) -> dict[str, Any]:
        """What `model` may be."""
        return videos.models()


def _one(router: APIRouter, videos: Videos) -> None:
    """The routes with the id of a video, which come last: any name fits there."""
    Looking = Annotated[Caller, Depends(videos.callers.looking)]

    @router.get(
        "/videos/{video_id}",
        response_model=objects.VideoObject,
        responses=NOT_FOUND,
        tags=["videos"],
    )
    def retrieve_video(video_id: str, caller: Looking) -> Response:
        """How far a video is; `openai-poll-after-ms` says when to ask again."""
        return videos.shown(videos.job(video_id, caller))

    @router.get(
        "/videos/{video_id}/content",
        response_class=Response,
        responses=NOT_FOUND | _FILES,
        tags=["videos"],
    )
    def download_content(
        request: Request,
        video_id: str,
        caller: Looking,
        variant: Literal["video", "thumbnail", "spritesheet"] = "video",
    ) -> Response:
        """The finished video, a picture of it, or a sheet of its frames; Range is understood."""
        return content(request, videos.service.files, videos.job(video_id, caller), variant)

    @router.delete(
        "/videos/{video_id}",
        response_model=objects.DeletedVideo,
        responses=NOT_FOUND,
        tags=["videos"],
    )
    def delete_video(video_id: str, caller: Looking) -> Response:
        """Delete a video and its files; one that is being made is cancelled."""
        return videos.deleted(video_id, caller)


_FILES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The file.",
        "content": {
            kind: {"schema": {"type": "string", "format": "binary"}}
            for kind in ("video/mp4", "image/webp", "image/jpeg")
        },
    },
    206: {"description": "The bytes that Range asks for."},
    416: {"description": "The file has no such bytes."},
}


def _makers(router: APIRouter, videos: Videos) -> None:
    """The routes that make something; each counts towards the key's rate."""
    Making = Annotated[Caller, Depends(videos.callers.making)]
    made: dict[str, Any] = {
        "response_model": objects.VideoObject,
        "responses": CONFLICT,
        "tags": ["videos"],
    }
    create = body_of(CreateFields)

    @router.post("/videos", **made, openapi_extra=create)
    async def create_video(request: Request, caller: Making) -> Response:
        """Make a video from a prompt, and from images, videos or a storyboard."""
        return await videos.make(request, caller, CreateFields, Asking.create)

    @router.post("/videos/edits", **made, openapi_extra=body_of(EditFields))
    async def edit_video(request: Request, caller: Making) -> Response:
        """Make a video anew after a prompt; `strength` says how much of it."""
        return await videos.make(request, caller, EditFields, Asking.edit)

    @router.post("/videos/extensions", **made, openapi_extra=body_of(ExtendFields))
    async def extend_video(request: Request, caller: Making) -> Response:
        """Make what comes after a video, or before it; the new seconds alone are billed."""
        return await videos.make(request, caller, ExtendFields, Asking.extend)

    @router.post(
        "/videos/characters",
        response_model=objects.CharacterObject,
        tags=["characters"],
        openapi_extra=body_of(CharacterFields),
    )
    async def create_character(request: Request, caller: Making) -> Response:
        """Make a character of a clip, for `characters` of later videos."""
        return await videos.make_character(request, caller)

    @router.post(
        "/videos/{video_id}/remix",
        **made | {"responses": CONFLICT | NOT_FOUND},
        openapi_extra=body_of(RemixFields),
    )
    async def remix_video(video_id: str, request: Request, caller: Making) -> Response:
        """Make a completed video once more, with its seed and another prompt."""

        def ask(asking: Asking, fields: RemixFields, body: Body) -> Wanted:
            videos.job(video_id, caller)
            return asking.remix(video_id, fields.prompt)

        return await videos.make(request, caller, RemixFields, ask)
