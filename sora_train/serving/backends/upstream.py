"""Another server's `/v1/videos`, call by call: what it answers, and of trouble whether it may have done what was asked.

Each answer is whole within its time and size, or none. The key goes to this server alone: nothing is redirected.
"""

import http.client
import ipaddress
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_train.base.chat import why
from sora_train.base.text import printable
from sora_train.base.timed import TimedHTTP, TimedHTTPS
from sora_train.errors import UserError
from sora_train.serving.backends.dialects import Written
from sora_train.serving.backends.mp4_boxes import mp4_fault

MOST_BYTES = 4 << 20
"""Largest answer but for videos."""
SHOWN = 300
"""Characters of an answer that a sentence quotes."""
PIECE = 1 << 16
DECLINED = (400, 413, 415, 422)
"""To a request that is not made better by sending it again."""
UNSURE = (502, 504)
"""Of whoever stands between: nobody knows whether the request was carried out."""


class Away(Exception):
    """Not now: nothing answers, or nothing that makes sense. `unsure`: what was asked may have been done all the same;
    `wait`: seconds that it asks to be left alone."""

    def __init__(self, problem: str, *, unsure: bool = True, wait: float = 0.0):
        super().__init__(problem)
        self.unsure, self.wait = unsure, wait


class Gone(Exception):
    """It knows no such video."""


class Declined(Exception):
    """It will not make this; the message is its own."""


class TooLarge(Exception):
    """A video over the limit."""


@dataclass(frozen=True)
class Theirs:
    """A video as the other server tells of it."""

    id: str
    status: str
    progress: int
    error: str
    """Its own words; '' for none."""


@dataclass(frozen=True)
class Upstream:
    """The server at `root`, which has no `/v1` at its end."""

    root: str
    key: str
    answer_seconds: float
    download_seconds: float
    download_bytes: int

    def create(self, request: Written, idempotency_key: str) -> Theirs:
        """Raises Away, Declined."""
        headers = {"Content-Type": request.kind, "Idempotency-Key": idempotency_key}
        try:
            return self._video(self._asked("POST", "/v1/videos", request.body, headers))
        except urllib.error.HTTPError as error:
            told = self._told(error)
            if error.code in DECLINED:
                raise Declined(told[1]) from None
            raise self._away(error, told[1]) from None

    def get(self, video_id: str) -> Theirs:
        """Raises Away, Gone."""
        try:
            theirs = self._video(self._asked("GET", _path(video_id)))
        except urllib.error.HTTPError as error:
            value, words = self._told(error)
            # vLLM-Omni tells of a video that failed with the status of what it failed of, 404 and 500 among them.
            if isinstance(value, dict) and value.get("status") == "failed":
                theirs = self._read(value)
            elif error.code == http.client.NOT_FOUND:
                raise Gone from None
            else:
                raise self._away(error, words) from None
        if theirs.id != video_id:
            raise Away(f"it tells of another video, {theirs.id!r:.{SHOWN}}")
        return theirs

    def delete(self, video_id: str) -> None:
        """Raises Away, Gone."""
        try:
            self._asked("DELETE", _path(video_id))
        except urllib.error.HTTPError as error:
            if error.code == http.client.NOT_FOUND:
                raise Gone from None
            raise self._away(error, self._told(error)[1]) from None

    def content(self, video_id: str, target: Path) -> None:
        """Download the video to a file, whose name means nothing yet.

        Raises:
            Away: nothing whole came.
            Gone: there is no such video, or no file of it.
            TooLarge: beyond the limit.
            OSError: of the disk.
        """
        path = f"{_path(video_id)}/content"
        try:
            with self._opened("GET", path, seconds=self.download_seconds) as response:
                self._store(response, target)
        except urllib.error.HTTPError as error:
            if error.code == http.client.NOT_FOUND:
                raise Gone from None
            raise self._away(error, self._told(error)[1]) from None
        if fault := mp4_fault(target):
            raise Away(f"what it sends as the video {fault}")

    def models(self) -> list[tuple[str, str]]:
        """(id, owner) of the models that it has. Raises Away."""
        listed = self._json("/v1/models").get("data")
        rows = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        return [(str(one["id"]), str(one.get("owned_by", ""))) for one in rows if one.get("id")]

    def paths(self) -> list[str]:
        """Of its openapi.json; none where it shows none. Raises Away."""
        try:
            paths = self._json("/openapi.json").get("paths")
        except Gone:
            return []
        return list(paths) if isinstance(paths, dict) else []

    # --- answers ---

    def _json(self, path: str) -> dict[str, Any]:
        try:
            value = _parsed(self._asked("GET", path))
        except urllib.error.HTTPError as error:
            if error.code == http.client.NOT_FOUND:
                raise Gone from None
            raise self._away(error, self._told(error)[1]) from None
        if not isinstance(value, dict):
            raise Away(f"{path} is no JSON object")
        return value

    def _video(self, data: bytes) -> Theirs:
        value = _parsed(data)
        if not isinstance(value, dict):
            raise Away(f"it answers no video: {self._shown(data)!r}")
        return self._read(value)

    def _read(self, value: dict[str, Any]) -> Theirs:
        video_id, status, progress = value.get("id"), value.get("status"), value.get("progress")
        if not isinstance(video_id, str) or not re.fullmatch(r"[\w.:~-]*\w[\w.:~-]*", video_id):
            raise Away(
                f"it answers a video with no id: {self._shown(json.dumps(value).encode())!r}"
            )
        if not isinstance(status, str):
            raise Away("it answers a video with no status")
        if not isinstance(progress, int | float) or not 0 <= progress <= 100:
            progress = 0
        error = value.get("error")
        return Theirs(video_id, status, int(progress), self._words(error) if error else "")

    def _told(self, error: urllib.error.HTTPError) -> tuple[Any, str]:
        """What came with an error's status: the JSON, and the words in it."""
        with error:
            try:
                data = error.read(MOST_BYTES)
            except (OSError, http.client.HTTPException, ValueError):
                data = b""
        value = _parsed(data)
        return value, self._words(value) or self._shown(data) or str(error.reason)

    def _words(self, value: Any) -> str:
        """The message in an error, whoever's way of writing it."""
        while isinstance(value, dict):
            value = next(
                (value[key] for key in ("error", "message", "detail") if value.get(key)), ""
            )
        return self._shown((value if isinstance(value, str) else json.dumps(value)).encode())

    def _shown(self, data: bytes) -> str:
        """The beginning of a text in one line, the key taken out."""
        text = printable(" ".join(data.decode(errors="replace").split()))
        return (text.replace(self.key, "...") if self.key else text)[:SHOWN]

    def _away(self, error: urllib.error.HTTPError, words: str) -> Away:
        wait = _seconds(error.headers.get("Retry-After", "") if error.headers else "")
        return Away(f"it answers {error.code}: {words}", unsure=error.code in UNSURE, wait=wait)

    # --- connections ---

    def _asked(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> bytes:
        """The body of an answer. Raises Away, and HTTPError for a status that is none of success."""
        with self._opened(method, path, body, headers or {}) as response:
            data = bytearray()
            while piece := _piece(response):
                data += piece
                if len(data) > MOST_BYTES:
                    raise Away(f"it answers more than {MOST_BYTES} bytes")
        return bytes(data)

    def _opened(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        seconds: float | None = None,
    ) -> Any:
        request = urllib.request.Request(
            self.root + path, body, {"Accept": "*/*", **(headers or {})}, method=method
        )
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        try:
            return _opener(self.root).open(request, timeout=seconds or self.answer_seconds)
        except urllib.error.HTTPError:
            raise
        except (OSError, http.client.HTTPException) as error:
            # Only a connection that was never made is sure to have carried nothing.
            unmade = isinstance(getattr(error, "reason", None), ConnectionRefusedError)
            raise Away(f"it cannot be reached: {why(error)}", unsure=not unmade) from None

    def _store(self, response: Any, target: Path) -> None:
        most = self.download_bytes
        if (response.length or 0) > most:
            raise TooLarge
        with target.open("wb") as file:
            while piece := _piece(response):
                if file.tell() + len(piece) > most:
                    raise TooLarge
                file.write(piece)


def upstream_root(url: str) -> str:
    """The address of a server without `/v1`. Raises UserError."""
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = urllib.parse.urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError(f"backend.url={url!r} is no address; write one such as http://gpu1:8000/v1")
    if "@" in parts.netloc:
        raise UserError(
            "backend.url holds a name or a password; give the key in the variable that backend.key_env names"
        )
    return url.rstrip("/").removesuffix("/v1")


class _Stays(urllib.request.HTTPRedirectHandler):
    """A redirection is an answer like any other that is of no use."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _opener(root: str) -> urllib.request.OpenerDirector:
    """Of connections that stay where they are sent; the environment's proxies never stand before this machine's own
    servers."""
    here = _is_here(urllib.parse.urlsplit(root).hostname or "")
    proxies: dict[str, str] | None = {} if here else None
    handlers = (urllib.request.ProxyHandler(proxies), _Stays(), TimedHTTP(), TimedHTTPS())
    return urllib.request.build_opener(*handlers)


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _piece(response: Any) -> bytes:
    """The next bytes of a body; none at its end. Raises Away where it ends too early, or too late."""
    try:
        piece = response.read1(PIECE)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Away(f"its answer is cut off: {why(error)}") from None
    if not piece and response.length:
        raise Away(f"its answer is cut off: {response.length} bytes are missing")
    return bytes(piece)


def _parsed(data: bytes) -> Any:
    """The value of some JSON; None for none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _path(video_id: str) -> str:
    return f"/v1/videos/{urllib.parse.quote(video_id, safe='')}"


def _seconds(text: str) -> float:
    """Of a header `Retry-After`; a date is no reason to wait longer than is usual."""
    try:
        return max(0.0, float(text))
    except ValueError:
        return 0.0
