"""What the OpenAPI page says of bodies and errors: read from the models of the fields, for JSON and forms alike."""

from typing import Any

from sora_train.serving.api.fields import Fields
from sora_train.serving.api.objects import ErrorObject

_FILE = {"type": "string", "format": "binary"}

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorObject, "description": text}
    for status, text in {
        400: "The request cannot be served as it stands; `param` names the field.",
        401: "No key, or one that is unknown, revoked or expired.",
        403: "Not for this caller.",
        413: "The body is too large.",
        429: "A limit of the key; `retry-after` says when to come again.",
        503: "Database or storage is away, or the queue is full; nothing was accepted.",
    }.items()
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorObject, "description": "No such video of this caller."}
}
CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorObject, "description": "The Idempotency-Key stands for another request."}
}
IDEMPOTENCY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Sent again with the same request, it gives the same video instead of a second one.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}


def body_of(fields: type[Fields]) -> dict[str, Any]:
    """`openapi_extra` of a POST with these fields."""
    schema = _inlined(fields.model_json_schema())
    form = {**schema, "properties": dict(schema["properties"])}
    for name in fields.uploads:
        form["properties"][name] = _FILE | _says(schema["properties"].get(name))
    if "files" in fields.uploads:
        form["properties"]["files"] = {"type": "array", "items": _FILE} | {
            "description": "What a storyboard shows, by the files' names."
        }
    content = {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}
    return {
        "requestBody": {"required": True, "content": content},
        "parameters": [IDEMPOTENCY],
    }


def _says(schema: dict[str, Any] | None) -> dict[str, Any]:
    text = (schema or {}).get("description")
    return {"description": text} if text else {}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without `$defs`, which lie elsewhere in OpenAPI."""
    definitions = schema.pop("$defs", {})

    def walk(node: Any) -> Any:
        if isinstance(node, list):
            return [walk(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            rest = {key: value for key, value in node.items() if key != "$ref"}
            return walk({**definitions[name], **rest})
        return {key: walk(value) for key, value in node.items()}

    return walk(schema)
