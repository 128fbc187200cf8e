"""What a model is asked of a clip, the JSON schema of its answer, and reading the answer."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from data_prep.captioning.language import ANY, other_language
from data_prep.captioning.settings import CaptionConfig
from sora_train.base.text import NotText, printable
from sora_train.data.captions.texts import text_or_fields

FIELDS = {
    "subject": "who or what is seen, with colours, clothes and number",
    "action": "what happens, in the order in which it happens",
    "setting": "where and when",
    "camera": "shot size, angle and camera movement; static where the camera does not move",
    "lighting": "light and weather",
    "style": "such as live action, animation, archive film",
}
TEXTS = {
    "short": "one sentence of at most 20 words",
    "dense": "three to six sentences that tell all of the above in plain language",
}
ASKED = (
    "These pictures are {frames} frames of one video clip in the order of time. Describe the clip for someone who has "
    "to film it again. Say only what can be seen; guess no names, sounds or intentions, and do not speak of frames or "
    "pictures."
)
_REFUSES = re.compile(
    r"^\W*(i['\u2019]?m sorry|sorry,|i apologi[sz]e|i can(no|['\u2019])t|i( am|['\u2019]m) (unable|not able)|"
    r"as an ai\b|unable to (help|assist|comply))",
    re.IGNORECASE,
)
_SHOWN = 80


class Rubbish(Exception):
    """An answer that is no caption; the text is the rest of a sentence that begins with who answered."""


@dataclass(frozen=True)
class Description:
    """A clip in words: structured fields, and two texts."""

    fields: dict[str, str]
    short: str
    dense: str


def prompt(settings: CaptionConfig) -> str:
    """What is asked beside the pictures."""
    named = {**FIELDS, **TEXTS}
    asked = settings.prompt or ASKED.format(frames=settings.frames)
    language = "" if settings.language == ANY else f" in the language {settings.language!r}"
    lines = [f'- "{name}": {meaning}' for name, meaning in named.items()]
    return (
        f"{asked}\n\nAnswer with one JSON object and nothing else. Its values are texts{language}; an empty one where "
        "nothing can be said:\n" + "\n".join(lines)
    )


def schema() -> dict[str, Any]:
    """The JSON schema of an answer, as strict structured output asks for it."""
    names = [*FIELDS, *TEXTS]
    return {
        "type": "object",
        "properties": {name: {"type": "string"} for name in names},
        "required": names,
        "additionalProperties": False,
    }


def version_of(settings: CaptionConfig) -> str:
    """caption_version: the user's word, and a digest of what is asked and of whom."""
    if settings.by == "given":
        return "given"
    who = settings.model if settings.by == "endpoint" else settings.model_path
    asked = settings.template if settings.by == "template" else f"{who}\n{prompt(settings)}"
    return f"{settings.version}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"


def parsed(text: str, settings: CaptionConfig) -> Description:
    """The description in an answer. Raises Rubbish for one that holds none."""
    values = _object(text)
    texts: dict[str, str] = {}
    for name in (*FIELDS, *TEXTS):
        if name not in values:
            raise Rubbish(f"leaves out the field {name!r}")
        texts[name] = _text(name, values[name])
    for name in TEXTS:
        if not texts[name]:
            raise Rubbish(f"leaves the field {name!r} empty")
        if _REFUSES.match(texts[name]):
            raise Rubbish(f"refuses: {texts[name]!r:.{_SHOWN}}")
        if len(texts[name]) > settings.max_characters:
            raise Rubbish(
                f"writes {len(texts[name])} characters in {name!r}, more than "
                f"caption.max_characters={settings.max_characters}"
            )
        if other := other_language(texts[name], settings.language):
            raise Rubbish(f"writes {other}, not the language caption.language={settings.language}")
    short, dense = texts.pop("short"), texts.pop("dense")
    return Description({name: value for name, value in texts.items() if value}, short, dense)


def _object(text: str) -> dict[str, Any]:
    """The first JSON object of a text; models like to write around it."""
    if not text.strip():
        raise Rubbish("answers nothing")
    if _REFUSES.match(text):
        raise Rubbish(f"refuses: {text!r:.{_SHOWN}}")
    begin = text.find("{")
    try:
        value, _ = json.JSONDecoder().raw_decode(text, max(0, begin))
    except (ValueError, RecursionError):
        raise Rubbish(f"answers no JSON: {printable(text)!r:.{_SHOWN}}") from None
    if not isinstance(value, dict):
        raise Rubbish(f"answers no JSON object: {printable(text)!r:.{_SHOWN}}")
    return value


def _text(name: str, value: object) -> str:
    try:
        text = text_or_fields({name: value} if isinstance(value, str | list) else None)
    except NotText as error:
        raise Rubbish(f"writes no text in {name!r}: {error}") from None
    if text is None:
        raise Rubbish(f"writes {type(value).__name__} in the field {name!r}, which is a text")
    return " ".join(text[name].split()) if isinstance(text, dict) else ""
