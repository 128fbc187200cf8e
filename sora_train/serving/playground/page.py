"""The routes of the page, and the policy by which a browser runs nothing but its own files."""

import hashlib
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from sora_train.serving.errors import NotFound

HERE = Path(__file__).parent
KINDS = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "form.js": "text/javascript; charset=utf-8",
    "server.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        # Files that a key protects, and those about to be uploaded, are shown from memory.
        "img-src 'self' blob:",
        "media-src 'self' blob:",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        # No text can become HTML, even by a mistake in the scripts.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def playground() -> APIRouter:
    """`/`, and below `/playground/` what the page is made of; all of it is read here, once."""
    files = {name: (HERE / name).read_bytes() for name in KINDS}
    tags = {name: f'"{hashlib.sha256(data).hexdigest()[:20]}"' for name, data in files.items()}
    router = APIRouter(include_in_schema=False)

    def answer(request: Request, name: str) -> Response:
        headers = {**_HEADERS, "etag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(files[name], headers=headers, media_type=KINDS[name])

    @router.get("/")
    def page(request: Request) -> Response:
        return answer(request, "index.html")

    @router.get("/playground/{name}")
    def part(request: Request, name: str) -> Response:
        if name not in files:
            raise NotFound("The playground has no such file.")
        return answer(request, name)

    return router
