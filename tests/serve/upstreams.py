"""Stand-ins for vLLM-Omni 0.30 and SGLang 0.5.23 on real sockets, which answer as those do until they are told to
misbehave. Their fields, statuses and refusals were read from the wheels of these versions."""

import asyncio
import json
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.responses import JSONResponse, Response

Send = Callable[[dict[str, Any]], Awaitable[None]]
Mood = Callable[[Send], Awaitable[None]]
"""What is answered instead."""


@dataclass
class Server:
    """A server's videos, and what it was sent. A video is completed after so many looks at it."""

    clip: bytes = b""
    looks: int = 2
    name: str = "tiny"
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    made: list[dict[str, Any]] = field(default_factory=list)
    """The fields of each video that was begun."""
    uploads: list[bytes] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    """Of every request."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request."""
    moods: list[tuple[str, str, Mood]] = field(default_factory=list)
    """(method, end of the path, what happens instead); each is gone after it was met."""
    always: list[tuple[str, str, Mood]] = field(default_factory=list)
    """The same for good."""
    failing: str = ""
    """The error of every video."""
    steps: list[Any] = field(default_factory=list)
    """Changes of a video's JSON at each look, in order."""
    port: int = 0

    def begin(self, fields: dict[str, Any], image: bytes | None) -> dict[str, Any]:
        self.made.append({name: value for name, value in fields.items() if value is not None})
        self.uploads.append(image or b"")
        job = {"id": f"video_gen_{uuid.uuid4().hex}", "object": "video", "status": "queued"}
        job |= {"progress": 0, "created_at": int(time.time()), "model": self.name, "looks": 0}
        self.jobs[job["id"]] = job
        return job

    def look(self, video_id: str) -> dict[str, Any]:
        job = self.jobs.get(video_id)
        if job is None:
            raise HTTPException(404, "Video not found")
        job["looks"] += 1
        job["status"] = "in_progress"
        if job["looks"] > self.looks:
            error = {"code": "RuntimeError", "message": self.failing} if self.failing else None
            job |= {"status": "failed" if error else "completed", "error": error}
            job["progress"] = 100
        return job | (self.steps.pop(0) if self.steps else {})

    def restart(self) -> None:
        self.jobs.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


def vllm_omni(server: Server) -> FastAPI:
    app, router = FastAPI(), APIRouter(prefix="/v1/videos")

    async def form(
        request: Request,
        prompt: str = Form(...),
        input_reference: Annotated[UploadFile | None, File()] = None,
        model: str | None = Form(None),
        width: int | None = Form(None),
        height: int | None = Form(None),
        num_frames: int | None = Form(None),
        fps: float | None = Form(None, ge=1, allow_inf_nan=False),
        num_inference_steps: int | None = Form(None, ge=1, le=200),
        guidance_scale: float | None = Form(None, ge=0, le=20),
        seed: int | None = Form(None),
        negative_prompt: str | None = Form(None),
    ) -> tuple[dict[str, Any], bytes | None]:
        fields = {name: value for name, value in locals().items() if name in KNOWN}
        sent = await request.form()
        assert set(sent) <= KNOWN | {"input_reference"}, sent
        if model not in (None, server.name):
            raise HTTPException(400, f"Model mismatch: server is running '{server.name}'.")
        return fields, await input_reference.read() if input_reference else None

    @router.post("")
    async def create(given: Annotated[Any, Depends(form)]) -> Any:
        return server.begin(*given)

    @router.post("/sync")
    async def sync(given: Annotated[Any, Depends(form)]) -> Any: ...

    @router.get("/{video_id}")
    async def get(video_id: str) -> Any:
        job = server.look(video_id)
        if job["status"] == "failed":  # with the status of what failed, and that as its code
            job = job | {"error": {"code": 500, "message": job["error"]["message"]}}
            return JSONResponse(job, 500)
        return job

    @router.delete("/{video_id}")
    async def delete(video_id: str) -> Any:
        if server.jobs.pop(video_id, None) is None:
            raise HTTPException(404, "Video not found")
        server.deleted.append(video_id)
        return {"id": video_id, "deleted": True, "object": "video.deleted"}

    _content(router, server)
    app.include_router(router)
    _models(app, server, "vllm")
    return app


def sglang(server: Server) -> FastAPI:
    app, router = FastAPI(), APIRouter(prefix="/v1/videos")

    @router.post("")
    async def create(
        request: Request,
        prompt: str | None = Form(None),
        input_reference: Annotated[UploadFile | None, File()] = None,
        model: str | None = Form(None),
        seconds: int | None = Form(None),
        size: str | None = Form(None),
        fps: int | None = Form(None),
        num_frames: int | None = Form(None),
        num_inference_steps: int | None = Form(None),
        guidance_scale: float | None = Form(None),
        seed: int | None = Form(None),
        negative_prompt: str | None = Form(None),
    ) -> Any:
        fields = {name: value for name, value in locals().items() if name in KNOWN}
        image = await input_reference.read() if input_reference else None
        if "multipart/form-data" not in request.headers["content-type"]:
            fields = await request.json()
            for name in ("fps", "num_frames", "seed", "seconds", "num_inference_steps"):
                if not isinstance(fields.get(name), int | None):
                    raise HTTPException(400, f"Invalid request body: {name}")
        assert set(fields) <= KNOWN, fields
        if not fields.get("prompt"):
            raise HTTPException(400, "prompt is required")
        return server.begin(fields, image)

    @router.get("/{video_id}")
    async def get(video_id: str) -> Any:
        return server.look(video_id)

    @router.delete("/{video_id}")
    async def delete(video_id: str) -> Any:
        job = server.jobs.pop(video_id, None)
        if job is None:
            raise HTTPException(404, "Video not found")
        server.deleted.append(video_id)
        return job | {"status": "deleted"}

    @app.post("/v1/set_lora")
    async def set_lora() -> Any: ...

    _content(router, server)
    app.include_router(router)
    _models(app, server, "sglang")
    return app


KNOWN = {
    "prompt", "model", "seconds", "size", "width", "height", "fps", "num_frames", "num_inference_steps",
    "guidance_scale", "seed", "negative_prompt",
}  # fmt: skip
APPS = {"vllm-omni": vllm_omni, "sglang": sglang}


def _content(router: APIRouter, server: Server) -> None:
    @router.get("/{video_id}/content")
    async def content(video_id: str) -> Any:
        job = server.jobs.get(video_id)
        if job is None or job["status"] != "completed":
            raise HTTPException(404, "Generation is still in-progress")
        return Response(server.clip, media_type="video/mp4")


def _models(app: FastAPI, server: Server, owner: str) -> None:
    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": server.name, "owned_by": owner}]}


@contextmanager
def serving(server: Server, dialect: str) -> Iterator[Server]:
    """The server on a port of the loopback, the one that it had before if it had one."""
    app = APPS[dialect](server)

    async def moody(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            method, path = scope["method"], scope["path"]
            server.requests.append((method, path))
            server.headers.append({k.decode(): v.decode() for k, v in scope["headers"]})
            for moods in (server.moods, server.always):
                for mood in moods:
                    if mood[0] == method and path.endswith(mood[1]):
                        if moods is server.moods:
                            moods.remove(mood)
                        while (await receive()).get("more_body"):
                            pass
                        return await mood[2](send)
        await app(scope, receive, send)

    config = uvicorn.Config(
        moody, "127.0.0.1", server.port, log_level="critical", lifespan="off", http="h11"
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.005)
    server.port = running.servers[0].sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        running.should_exit = running.force_exit = True
        thread.join(10)


# --- moods ---


def answers(status: int, body: Any = b"", **headers: str) -> Mood:
    """Another answer than the right one."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def mood(send: Send) -> None:
        pairs = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        if "content_length" not in headers:
            pairs.append((b"content-length", str(len(data)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        await send({"type": "http.response.body", "body": data})

    return mood


def cut_off(body: bytes, told: int) -> Mood:
    """A body that ends before the length that was told."""

    async def mood(send: Send) -> None:
        pairs = [(b"content-length", str(told).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": pairs})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await asyncio.sleep(0.05)
        send.__self__.transport.close()  # type: ignore[attr-defined]

    return mood


def drips(data: bytes, seconds: float) -> Mood:
    """One byte at a time."""

    async def mood(send: Send) -> None:
        pairs = [(b"content-length", str(len(data)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": pairs})
        for place in range(len(data)):
            await send(
                {"type": "http.response.body", "body": data[place : place + 1], "more_body": True}
            )
            await asyncio.sleep(seconds)

    return mood


async def resets(send: Send) -> None:
    """The connection ends with a reset, before an answer."""
    send.__self__.transport.abort()  # type: ignore[attr-defined]


def silent(seconds: float) -> Mood:
    async def mood(send: Send) -> None:
        await asyncio.sleep(seconds)

    return mood


def after(does: Callable[[], object], mood: Mood) -> Mood:
    """The same, once something was done."""

    async def both(send: Send) -> None:
        does()
        await mood(send)

    return both
