"""The captions of a clip as texts: how a manifest keeps several, and how fields become a prompt.

A clip has a main caption, whose name is `caption`, and may have others by name: plain texts, or
structured fields (subject, action, camera, ...). A manifest keeps the others as one JSON object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

MAIN = "caption"
FIELD_ORDER = (
    "subject",
    "subjects",
    "action",
    "setting",
    "background",
    "environment",
    "camera",
    "shot_type",
    "camera_angle",
    "camera_motion",
    "lighting",
    "style",
    "mood",
    "atmosphere",
)
"""Fields of a prompt come in this order, all others after them in that of their names."""

Fields = dict[str, str]
Named = dict[str, str | Fields]


def text_or_fields(value: object) -> str | Fields | None:
    """A caption as it is kept: a text, or fields that say something. None for what is neither.

    Texts within a field (a list of subjects, say) are joined by commas. What says nothing is ''.
    """
    if isinstance(value, Mapping):
        fields = {_clean(str(name)): _joined(said) for name, said in value.items()}
        if None in fields.values():
            return None
        return {name: said for name, said in fields.items() if said} or ""
    return _clean(value) if isinstance(value, str) else None


def _joined(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return _clean(value or "")
    parts = list(value.values()) if isinstance(value, Mapping) else value
    if not isinstance(parts, list | tuple):
        return None
    texts = [_joined(part) for part in parts]
    return None if None in texts else ", ".join(filter(None, texts))


def _clean(text: str) -> str:
    """Half of a surrogate pair, which JSON can hold, is no text that could be written or embedded."""
    return text.encode(errors="replace").decode().strip()


def named_by(found: object) -> Named:
    """The captions in an object of them, by name, in its order; what is neither text nor fields is left out."""
    if not isinstance(found, Mapping):
        return {}
    texts = {_clean(str(name)): text_or_fields(said) for name, said in found.items()}
    return {name: said for name, said in texts.items() if name and said}


def with_main(main: str, named: Named) -> tuple[str, str]:
    """A manifest's columns `caption` and `captions` of a clip with a main caption, or none, and others.

    Without a main caption the first of the others takes its place, beside keeping its own name: a
    clip that says something is never one without a caption.
    """
    others = dict(named)
    own = others.pop(MAIN, "")
    main = main or as_prompt(own) or next((as_prompt(said) for said in others.values()), "")
    return main, dumped(others)


def dumped(known: Mapping[str, object]) -> str:
    """A JSON object as it stands in a column: the same text for the same content, '' for an empty one."""
    return json.dumps(known, sort_keys=True, ensure_ascii=False) if known else ""


def named_captions(captions: str) -> Named:
    """The captions that a manifest's column `captions` names."""
    return json.loads(captions) if captions else {}


def known_scores(found: object) -> dict[str, float]:
    """The scores of a sample: what is a number in an object of them, by name."""
    if not isinstance(found, Mapping):
        return {}
    return {
        str(name): float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def as_prompt(said: str | Fields) -> str:
    """A caption as one text; fields in the order of FIELD_ORDER, each a sentence of its own."""
    if isinstance(said, str):
        return said
    texts = [said[name] for name in sorted(said, key=_place)]
    return " ".join(text if text.endswith((".", "!", "?")) else f"{text}." for text in texts)


def _place(name: str) -> tuple[int, str]:
    plain = name.lower().replace(" ", "_").replace("-", "_")
    return (FIELD_ORDER.index(plain) if plain in FIELD_ORDER else len(FIELD_ORDER)), name
