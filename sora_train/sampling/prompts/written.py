"""Prompts as a user writes them, in text or in fields, and the text that a model reads for each.

Fields become what the captions became that the model was trained on, by the same functions, so that a prompt
reads as a caption does.
"""

import re
import unicodedata

from pydantic import ValidationInfo, field_validator, model_validator

from sora_train.base.text import require_text
from sora_train.config.sections.base import Section
from sora_train.data.captions.texts import as_prompt
from sora_train.data.shapes import captions as shapes
from sora_train.errors import UserError

FIELDS = ("subject", "action", "setting", "camera", "lighting", "style", "mood")
_WORDS_AROUND = {
    "setting": ("on a ", " background"),
    "lighting": ("", " light"),
    "style": ("", " style"),
}
"""What captions of the shapes world have around a value, which a user need not write."""


def cleaned(text: str, info: ValidationInfo) -> str:
    """The validator of a text in a file: see `clean`."""
    try:
        return clean(text, str(info.field_name))
    except UserError as error:
        raise ValueError(str(error)) from None


class Written(Section):
    """A prompt: its text, or fields of it."""

    prompt: str = ""
    """What to show as one text, in place of the fields."""
    subject: str = ""
    """Who or what is seen, with colours, clothes and number."""
    action: str = ""
    """What happens, in the order in which it happens."""
    setting: str = ""
    """Where and when."""
    camera: str = ""
    """Shot size, angle and camera movement."""
    lighting: str = ""
    """Light and weather."""
    style: str = ""
    """Such as live action, animation, archive film."""
    mood: str = ""
    """The feeling that it should have."""
    negative: str = ""
    """What guidance leads away from."""

    _texts = field_validator("*")(cleaned)

    @model_validator(mode="after")
    def _one_form(self) -> "Written":
        if self.prompt and self.fields:
            raise ValueError(
                f"a prompt is a text or fields: it has prompt and {', '.join(self.fields)}; write one of both"
            )
        return self

    @property
    def fields(self) -> dict[str, str]:
        """The fields that say something."""
        return {name: text for name in FIELDS if (text := getattr(self, name))}

    def text(self, source: str) -> str:
        """What a model reads that was trained on `data.source`."""
        if not self.fields:
            return self.prompt
        return _of_shapes(self.fields) if source == "shapes" else as_prompt(self.fields)


def clean(text: str, name: str) -> str:
    """The text on one line. Raises UserError, which names it by `name`, for characters that no text has."""
    line = re.sub(r"\s*[\t\r\n]\s*", " ", require_text(text, name)).strip()
    for place, character in enumerate(line, 1):
        if unicodedata.category(character) == "Cc" and not character.isspace():
            raise UserError(
                f"{name} holds a control character, U+{ord(character):04X}, at place {place}; take it out"
            )
    return line


def _of_shapes(fields: dict[str, str]) -> str:
    """A caption of the shapes world: `dark` is `on a dark background` there."""
    named = dict(fields)
    for name, (before, behind) in _WORDS_AROUND.items():
        if value := named.get(name):
            bare = value.removeprefix("on ").removeprefix("a ").removesuffix(behind)
            named[name] = f"{before}{bare}{behind}"
    if mood := named.pop("mood", ""):
        named["style"] = ", ".join(filter(None, [named.get("style"), mood]))
    return shapes.joined(named)
