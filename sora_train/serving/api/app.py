"""The app of the gateway: routes, what is answered to whatever goes wrong, health and measures."""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from sora_train.errors import Fault
from sora_train.serving.api.gate import Gate, as_api_error
from sora_train.serving.api.measures import Measures
from sora_train.serving.api.reference import page_of
from sora_train.serving.api.videos import routes
from sora_train.serving.errors import ApiError, BadRequest, NotAllowed, NotFound
from sora_train.serving.playground.page import playground
from sora_train.serving.service import Service


def build_app(service: Service, fetch: Callable[[str], bytes] | None = None) -> FastAPI:
    """The gateway of a service.

    Args:
        fetch: bytes of an image's address for `image_url`; default: from the public internet alone.
    """
    app = FastAPI(
        title="sora_train",
        summary="Text to video, as OpenAI's /v1/videos has it.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    measures = Measures(service.store)
    _explain_errors(app)
    app.include_router(routes(service, fetch or _from_internet()))
    app.include_router(playground())
    _add_health(app, service, measures)
    app.add_middleware(
        Gate, most_bytes=service.settings.limits.upload_bytes, measured=measures.request
    )
    return app


def _from_internet() -> Callable[[str], bytes]:
    from sora_train.serving.safety.remote_images import RemoteImages

    return RemoteImages().fetch


def _explain_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape. What no handler takes is the gate's."""

    def answered(error: ApiError, headers: Any = None) -> Response:
        return JSONResponse(error.body, error.status, {**(headers or {}), **error.headers})

    @app.exception_handler(ApiError)
    async def of_ours(request: Request, error: ApiError) -> Response:
        return answered(error)

    @app.exception_handler(HTTPException)
    async def of_routing(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            return answered(NotFound("There is no such path; /docs lists those there are."))
        if error.status_code == 405:
            return answered(NotAllowed("The path does not know this method."), error.headers)
        other = BadRequest(None, "The request cannot be read.")
        other.status = error.status_code
        return answered(other, error.headers)

    @app.exception_handler(RequestValidationError)
    async def of_parameters(request: Request, error: RequestValidationError) -> Response:
        detail = error.errors()[0]
        name = str(detail["loc"][-1])
        text = detail["msg"].replace("Input should", "must").replace("String should", "must")
        return answered(BadRequest(name, f"Invalid value for '{name}': {text}."))


def _add_health(app: FastAPI, service: Service, measures: Measures) -> None:
    @app.get("/healthz", tags=["health"])
    def healthz() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"])
    def readyz() -> Response:
        """Whether database and files do too."""
        try:
            service.store.counts()
            service.files.size("ready")
        except (Fault, OSError) as error:
            told = as_api_error(error)
            return JSONResponse(told.body, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", response_class=Response, tags=["health"])
    def metrics() -> Response:
        """For Prometheus."""
        return Response(measures.text(), media_type=measures.kind)

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(page_of(app.openapi()))
