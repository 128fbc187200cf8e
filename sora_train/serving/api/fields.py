"""The fields of requests: names, kinds and bounds of OpenAI's and of our own, and the sentence for each that is wrong.

Forms carry texts alone, so numbers may be written as texts everywhere.
"""

import json
import math
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
from pydantic import AfterValidator, BeforeValidator, Field

from sora_train.config.schema import closest
from sora_train.errors import UserError
from sora_train.sampling.prompts.storyboard import CueSection
from sora_train.sampling.prompts.written import clean
from sora_train.serving.api.bodies import Body
from sora_train.serving.errors import BadRequest
from sora_train.serving.settings import parse_size

MOST_CHARACTERS = 32_000
MOST_FILES = 16
SHOWN = 80
"""Characters of a wrong value that a sentence quotes."""


def _text(text: str, info: pydantic.ValidationInfo) -> str:
    try:
        return clean(text, str(info.field_name))
    except UserError as error:
        raise ValueError(str(error)) from None


def _said(text: str, info: pydantic.ValidationInfo) -> str:
    line = _text(text, info)
    if not line:
        raise ValueError("is empty")
    return line


def _number(value: Any) -> Any:
    """A number may be a text; true and false are none, though Python counts with them."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _size(text: str) -> str:
    if parse_size(text) is None:
        raise ValueError("must be WIDTHxHEIGHT in even pixels, such as '1280x720'")
    return text


def _structured(value: Any) -> Any:
    """A list or an object, or the JSON of one, which is how it gets through a form."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("is not valid JSON") from None


def _names(value: Any) -> Any:
    """One name, or several in a list; each may be an object with its id."""
    value = _structured(value)
    several = value if isinstance(value, list) else [value]
    return [one["id"] if isinstance(one, dict) and set(one) == {"id"} else one for one in several]


def _gap(value: Any) -> Any:
    """`5:13` as on the command line."""
    return value.split(":") if isinstance(value, str) and ":" in value else _structured(value)


def _cues(value: Any) -> Any:
    value = _structured(value)
    return value["cues"] if isinstance(value, dict) and set(value) == {"cues"} else value


Text = Annotated[str, Field(max_length=MOST_CHARACTERS), AfterValidator(_text)]
Prompt = Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS), AfterValidator(_said)]
Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_said)]
Whole = BeforeValidator(_number)
Seconds = Annotated[float, Whole, Field(gt=0, le=3600, allow_inf_nan=False)]
Size = Annotated[str, Field(max_length=11), AfterValidator(_size)]
Names = Annotated[list[Name], BeforeValidator(_names), Field(max_length=MOST_FILES)]
Count = Annotated[int, Whole, Field(ge=1, le=100_000)]


class Reference(pydantic.BaseModel):
    """A file that lies elsewhere: an address of an image, or a video made here."""

    model_config = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)

    image_url: str | None = None
    """Address of an image, or a data URL."""
    file_id: str | None = None
    """Of OpenAI's files, which this server does not keep."""
    id: str | None = None
    """Of a completed video."""


File = Annotated[Reference, BeforeValidator(_structured)]
"""A reference; an upload in its place was taken out before the fields are read."""


class Fields(pydantic.BaseModel):
    """A request; an unknown field is an error."""

    model_config = pydantic.ConfigDict(extra="forbid", use_attribute_docstrings=True)
    uploads: ClassVar[tuple[str, ...]] = ()
    """Fields of a form that may be files."""


class RemixFields(Fields):
    prompt: Prompt
    """What the video shows instead."""


class CharacterFields(Fields):
    uploads = ("video",)
    name: Name
    """By which prompts name the character."""


class Making(Fields):
    """What our sampler may be told beside OpenAI's fields."""

    prompt: Prompt
    """What the video shows."""
    negative_prompt: Text = ""
    """What guidance leads away from."""
    steps: Annotated[int, Whole, Field(ge=1, le=1000)] | None = None
    """Sampling steps; as the model's run has them if left out."""
    guidance_scale: Annotated[float, Whole, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    """How strongly the prompt leads."""
    seed: Annotated[int, Whole, Field(ge=0, lt=1 << 63)] | None = None
    """Of the noise; the same seed makes the same video."""
    strength: Annotated[float, Whole, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """How much of a video is made anew: near 0 little, 1 everything."""
    adapters: Names = []
    """Names of adapters that the server offers."""


class EditFields(Making):
    uploads = ("video",)
    video: File | None = None
    """`{"id": ...}` of a completed video, or a file."""


class ExtendFields(Making):
    uploads = ("video",)
    seconds: Seconds
    """How much is added."""
    video: File | None = None
    """`{"id": ...}` of a completed video, or a file."""
    direction: Annotated[str, Field(pattern="^(forward|backward)$")] = "forward"
    """`backward` adds what comes before."""
    frames_given: Count | None = None
    """Frames of the video that the new part is made from."""


class CreateFields(Making):
    uploads = ("input_reference", "image", "last_image", "video", "files")
    model: Name | None = None
    """One of /v1/models; the first if left out."""
    seconds: Seconds | None = None
    """Length of the video."""
    size: Size | None = None
    """WIDTHxHEIGHT in pixels."""
    frames: Count | None = None
    """Length in frames, in place of `seconds`."""
    fps: Annotated[float, Whole, Field(gt=0, lt=1000, allow_inf_nan=False)] | None = None
    """Frames a second."""
    operation: Name | None = None
    """t2v, i2v, extend, extend-back, infill, connect, loop, edit or upscale; what fits the files if left out."""
    input_reference: File | None = None
    """An image that the video begins with, or the file that `operation` is done with."""
    image: File | None = None
    """The image of i2v, loop or edit."""
    last_image: File | None = None
    """An image that the video ends with."""
    video: File | None = None
    """The video of `operation`: a file, or `{"id": ...}`; connect takes two files."""
    gap: Annotated[list[Annotated[int, Whole]], BeforeValidator(_gap)] | None = Field(
        None, min_length=2, max_length=2
    )
    """[first, end] frames of a video that infill makes anew."""
    frames_given: Count | None = None
    """Frames taken from each video."""
    storyboard: Annotated[list[CueSection], BeforeValidator(_cues)] | None = Field(
        None, min_length=1, max_length=1000
    )
    """Cues `{"at": seconds, "prompt": ...}`; `image` or `video` of a cue names one of `files`."""
    characters: Names = []
    """Ids of characters."""


F = TypeVar("F", bound=Fields)


def read_fields(cls: type[F], body: Body) -> F:
    """The fields of a body. Raises BadRequest that names the first field that is wrong."""
    for name, files in body.files.items():
        if name not in cls.uploads:
            raise BadRequest(name, f"'{name}' takes no file here.", "unknown_parameter")
        if len(files) > MOST_FILES:
            raise BadRequest(name, f"'{name}' holds {len(files)} files; at most {MOST_FILES}.")
        if name in body.values:
            raise BadRequest(name, f"'{name}' is a file and a reference at once; send one of them.")
    try:
        return cls.model_validate(body.values)
    except pydantic.ValidationError as error:
        raise _told(cls, error) from None


def _told(cls: type[Fields], error: pydantic.ValidationError) -> BadRequest:
    detail = error.errors(include_url=False)[0]
    place = [part for part in detail["loc"] if not _is_inner(part)]
    name = _dotted(place)
    kind, known = detail["type"], [*cls.model_fields]
    if kind == "extra_forbidden":
        near = closest(str(place[-1]), known) if len(place) == 1 else None
        hint = f" Did you mean '{near}'?" if near else ""
        return BadRequest(name, f"Unknown parameter: '{name}'.{hint}", "unknown_parameter")
    if kind == "missing":
        return BadRequest(
            name, f"Missing required parameter: '{name}'.", "missing_required_parameter"
        )
    if kind == "value_error":
        text = str(detail.get("ctx", {}).get("error", detail["msg"]))
    else:
        text = detail["msg"].replace("Input should", "must").replace("String should", "must")
        text = text.replace("List should", "must").replace("Value should", "must")
        text = f"{text}, got {shown(detail['input'])}"
    return BadRequest(name, f"Invalid value for '{name}': {text}.")


def _is_inner(part: Any) -> bool:
    """Pydantic names the kinds that it tried, such as `function-before[...]`."""
    return isinstance(part, str) and ("[" in part or part in ("str", "dict", "list", "Reference"))


def _dotted(place: list[Any]) -> str:
    name = ""
    for part in place:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name[:SHOWN]


def shown(value: Any) -> str:
    """A wrong value for a sentence, short and printable."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=type_name)
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def type_name(value: Any) -> str:
    return f"<{type(value).__name__}>"
