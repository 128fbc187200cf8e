"""What servers that speak `/v1/videos` know beside OpenAI's fields, and how each wants a request written.

As vLLM-Omni 0.30 and SGLang 0.5.23 have it. Both make one video at a time from a text, or from a text and an image.
"""

import json
import mimetypes
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sora_train.serving.backends.base import BadRequest
from sora_train.serving.jobs.job import Asked

OPERATIONS = ("t2v", "i2v")
ELSEWHERE = {
    "storyboard": "storyboard",
    "adapters": "adapters",
    "character": "characters",
    "strength": "strength",
    "gap": "gap",
    "frames_given": "frames_given",
}
"""Attribute of what is asked -> parameter, of what no other server makes."""


@dataclass(frozen=True)
class Written:
    """The body of a request."""

    body: bytes
    kind: str
    """Its Content-Type."""


class Dialect:
    """OpenAI's own fields; what another server knows beside them is a subclass."""

    name: ClassVar[str] = "openai"
    extras: ClassVar[dict[str, str]] = {}
    """Attribute of what is asked -> the server's field for it."""

    def check(self, asked: Asked) -> None:
        """Raises BadRequest for what this server would leave out or refuse."""
        check_any(asked)
        for name in ("frames", "fps", "steps", "guidance_scale", "negative_prompt", "seed"):
            if getattr(asked, name) not in (None, "") and name not in self.extras:
                raise BadRequest(name, f"the server of this model knows no '{name}'; leave it out")
        self._check_values(asked)

    def _check_values(self, asked: Asked) -> None:
        require_whole("seconds", asked.seconds)

    def written(self, asked: Asked, fps: float, seed: int, image: Path | None) -> Written:
        """The request of one video; `fps` is that of the model, `seed` the job's."""
        return multipart(self._fields(asked, fps, seed), image)

    def _fields(self, asked: Asked, fps: float, seed: int) -> dict[str, Any]:
        width, height = asked.size
        seconds = str(round(asked.seconds))
        return self._common(asked) | {"seconds": seconds, "size": f"{width}x{height}"}

    def _common(self, asked: Asked) -> dict[str, Any]:
        given = {field: getattr(asked, name) for name, field in self.extras.items()}
        given |= {"prompt": asked.prompt, "model": asked.model}
        return {field: value for field, value in given.items() if value not in (None, "")}


class VllmOmni(Dialect):
    """`vllm serve DIR --omni`: forms alone; a field out of its bounds is refused."""

    name = "vllm-omni"
    extras: ClassVar[dict[str, str]] = {
        "frames": "num_frames",
        "fps": "fps",
        "steps": "num_inference_steps",
        "guidance_scale": "guidance_scale",
        "negative_prompt": "negative_prompt",
        "seed": "seed",
    }

    def _check_values(self, asked: Asked) -> None:
        for name, least, most in (("steps", 1, 200), ("guidance_scale", 0, 20)):
            value = getattr(asked, name)
            if value is not None and not least <= value <= most:
                raise BadRequest(
                    name,
                    f"'{name}' is {value:g}; the server of this model takes {least} to {most}",
                )

    def _fields(self, asked: Asked, fps: float, seed: int) -> dict[str, Any]:
        width, height = asked.size
        return self._common(asked) | _length(asked, fps, seed) | {"width": width, "height": height}


class SGLang(VllmOmni):
    """`sglang serve --model-path DIR`: a text alone as JSON, an image in a form; frames a second are whole."""

    name = "sglang"

    def _check_values(self, asked: Asked) -> None:
        super()._check_values(asked)
        require_whole("fps", asked.fps)

    def _fields(self, asked: Asked, fps: float, seed: int) -> dict[str, Any]:
        width, height = asked.size
        return self._common(asked) | _length(asked, fps, seed) | {"size": f"{width}x{height}"}

    def written(self, asked: Asked, fps: float, seed: int, image: Path | None) -> Written:
        fields = self._fields(asked, fps, seed)
        if image is not None:
            return multipart(fields, image)
        return Written(json.dumps(fields).encode(), "application/json")


DIALECTS: dict[str, Dialect] = {one.name: one for one in (Dialect(), VllmOmni(), SGLang())}


def check_any(asked: Asked) -> None:
    """Raises BadRequest for what none of these servers makes."""
    if asked.sampling_op not in OPERATIONS:
        raise BadRequest(
            "operation",
            f"the server of this model makes videos from a text, or a text and an image; '{asked.sampling_op}' is "
            "not offered",
        )
    for name, param in ELSEWHERE.items():
        if getattr(asked, name):
            raise BadRequest(param, f"the server of this model knows no '{param}'; leave it out")
    if len(asked.uploads) > 1 or any(one.kind != "image" for one in asked.uploads):
        raise BadRequest(
            "input_reference", "the server of this model takes one image; send one image at most"
        )
    if any(Path(one.name).stem == "last_image" for one in asked.uploads):
        raise BadRequest(
            "last_image", "the server of this model begins with an image, and ends with none"
        )


def require_whole(name: str, value: float | None) -> None:
    """Raises BadRequest for a number that is not whole, to a server that reads none but whole ones."""
    if value is not None and not float(value).is_integer():
        raise BadRequest(name, f"'{name}' is {value:g}; the server of this model takes whole ones")


def told_apart(paths: list[str], owner: str) -> Dialect | None:
    """The dialect of a server by the paths of its openapi.json, or by who owns its models; None: not known."""
    for name, mark in (("vllm-omni", "/v1/videos/sync"), ("sglang", "/v1/set_lora")):
        if mark in paths or owner == name.partition("-")[0]:
            return DIALECTS[name]
    remixes = any(path.startswith("/v1/videos/") and path.endswith("/remix") for path in paths)
    return DIALECTS["openai"] if remixes else None


def multipart(fields: dict[str, Any], image: Path | None) -> Written:
    """A form with its fields as texts, and the image as a file."""
    boundary = secrets.token_hex(16)
    parts = []
    for name, value in fields.items():
        parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode())
    if image is not None:
        kind = mimetypes.guess_type(image.name)[0] or "application/octet-stream"
        head = (
            f'Content-Disposition: form-data; name="input_reference"; filename="reference{image.suffix}"\r\n'
            f"Content-Type: {kind}\r\n\r\n"
        )
        parts.append(head.encode() + image.read_bytes())
    lines = b"".join(b"--" + boundary.encode() + b"\r\n" + part + b"\r\n" for part in parts)
    whole = lines + f"--{boundary}--\r\n".encode()
    return Written(whole, f"multipart/form-data; boundary={boundary}")


def _length(asked: Asked, fps: float, seed: int) -> dict[str, Any]:
    rate = asked.fps or fps
    rate = int(rate) if float(rate).is_integer() else rate
    return {
        "num_frames": asked.frames or max(1, round(asked.seconds * rate)),
        "fps": rate,
        "seed": seed,
    }
