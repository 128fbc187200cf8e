"""Bodies of requests, JSON or a form, as the same nested values with the files apart.

OpenAI's Python client sends forms for most calls: numbers as texts, objects as `key[sub]`, lists as `key[]`, `bytes` as
a file called `upload` without a kind. Lists of objects do not survive it (`key[][a]` all first, then `key[][b]`).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request

from sora_train.serving.errors import BadRequest, TooLarge

MOST_FIELDS = 200
_KEY = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")


@dataclass(frozen=True)
class Body:
    """What a request holds."""

    values: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[UploadFile]] = field(default_factory=dict)
    """By the name of the field."""


async def read_body(request: Request, json_bytes: int) -> Body:
    """The body of a POST. Raises BadRequest for what cannot be read, TooLarge for JSON of more bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
            return await _form(request, json_bytes)
        if kind == "application/json" or not kind:
            return Body(_json(await _bytes(request, json_bytes)))
    except ClientDisconnect:
        raise BadRequest(None, "The request ended before its body did.") from None
    raise BadRequest(
        None,
        "The body must be application/json or multipart/form-data.",
        "unsupported_content_type",
    )


async def _bytes(request: Request, most: int) -> bytes:
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > most:
            raise TooLarge(f"A JSON body may have {most} bytes; send files as multipart/form-data.")
    return bytes(data)


def _json(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data or b"{}", parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise BadRequest(None, "The body is not valid JSON.", "invalid_json") from None
    if not isinstance(values, dict):
        raise BadRequest(None, "The body must be a JSON object.", "invalid_json")
    return values


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


async def _form(request: Request, json_bytes: int) -> Body:
    try:
        form = await request.form(
            max_files=MOST_FIELDS, max_fields=MOST_FIELDS, max_part_size=json_bytes
        )
    except MultiPartException as error:
        raise BadRequest(
            None, f"The form cannot be read: {_plain(error.message)}", "invalid_form"
        ) from None
    except Exception as error:
        # Starlette answers the faults of its parser as HTTP exceptions where an app is around it.
        detail = getattr(error, "detail", None)
        if detail is None:
            raise
        raise BadRequest(
            None, f"The form cannot be read: {_plain(detail)}", "invalid_form"
        ) from None
    body = Body()
    for key, value in form.multi_items():
        if isinstance(value, UploadFile):
            body.files.setdefault(key.removesuffix("[]"), []).append(value)
        else:
            _put(body.values, key, value)
    return body


def _plain(text: Any) -> str:
    return str(text).encode("ascii", "backslashreplace").decode()[:200].rstrip(".") + "."


def _put(values: dict[str, Any], key: str, value: str) -> None:
    """Put a field of a form where its brackets say. Raises BadRequest for lists of objects and for nonsense."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise BadRequest(
            key[:80], "A field's name is like 'a', 'a[b]' or 'a[]'.", "unknown_parameter"
        )
    name, rest = match[1], re.findall(r"\[([^\[\]]*)\]", match[2])
    if "" in rest[:-1]:
        raise BadRequest(
            name,
            f"'{name}' is a list of objects, which the client's form mixes up beyond repair: send it as a JSON string "
            f'(extra_body={{"{name}": json.dumps(...)}}), or the whole request as JSON '
            '(extra_headers={"Content-Type": "application/json"}).',
        )
    place = values
    for inner in rest if rest[-1:] != [""] else rest[:-1]:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise BadRequest(key[:80], f"'{key[:80]}' and '{match[1]}' are given both.")
        name = inner
    if rest[-1:] == [""]:
        several = place.setdefault(name, [])
        if not isinstance(several, list):
            raise BadRequest(key[:80], f"'{key[:80]}' and '{match[1]}' are given both.")
        several.append(value)
    elif name in place:
        raise BadRequest(key[:80], f"'{key[:80]}' is given twice.")
    else:
        place[name] = value


def all_files(body: Body) -> Iterator[tuple[str, UploadFile]]:
    for name, files in body.files.items():
        yield from ((name, file) for file in files)
