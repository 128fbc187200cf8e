"""The captions of a clip as texts: how a manifest keeps several, and how fields become a prompt.

A clip has a main caption, whose name is `caption`, and may have others by name: plain texts, or
structured fields (subject, action, camera, ...). A manifest keeps the others as one JSON object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from sora_train.base.text import lines_of, require_text

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
"""The order of fields in a prompt; all others follow by name."""

Fields = dict[str, str]
Named = dict[str, str | Fields]


def text_or_fields(value: object) -> str | Fields | None:
    """A caption in the form of a manifest: a text, or its fields that are not empty; None for other values.

    Texts within a field (such as a list of subjects) are joined by commas. An empty caption is ''.
    Raises NotText on half of a surrogate pair.
    """
    if isinstance(value, Mapping):
        fields = {_clean(str(name)): _joined(texts) for name, texts in value.items()}
        if None in fields.values():
            return None
        return {name: text for name, text in fields.items() if text} or ""
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
    return require_text(text, "a caption").strip()


def told(value: object) -> str:
    """What a value of a table or a JSON file is that is no text, in words: `a number: 3`."""
    if value is None:
        return "null"
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    kinds = (
        (bool, "a truth value"),
        (int | float, "a number"),
        (Mapping, "an object"),
        (list, "a list"),
    )
    kind = next((name for types, name in kinds if isinstance(value, types)), type(value).__name__)
    return f"{kind}: {value!r:.80}"


def caption_of_file(text: str) -> str:
    """The caption that a text file holds; its line ends are the file's."""
    return "\n".join(lines_of(text)).strip()


def named_by(captions: object) -> Named:
    """The captions of an object by name, in its order, without values that are neither. Raises NotText."""
    if not isinstance(captions, Mapping):
        return {}
    named = {_clean(str(name)): text_or_fields(caption) for name, caption in captions.items()}
    return {name: caption for name, caption in named.items() if name and caption}


def with_main(main: str, named: Named) -> tuple[str, str]:
    """A manifest's columns `caption` and `captions` of a clip with a main caption ('': none) and others.

    Without a main caption the first of the others is the main one too, so that a clip with any
    caption has a main one.
    """
    others = dict(named)
    own = others.pop(MAIN, "")
    main = main or as_prompt(own) or next(map(as_prompt, others.values()), "")
    return main, dumped(others)


def dumped(value: Mapping[str, object]) -> str:
    """A JSON object as text of a column: equal text for equal content, '' for an empty one."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False) if value else ""


def named_captions(captions: str) -> Named:
    """The captions in a manifest's column `captions`."""
    return json.loads(captions) if captions else {}


def known_scores(scores: object) -> dict[str, float]:
    """The scores of an object by name, without values that are no finite number. Raises NotText."""
    if not isinstance(scores, Mapping):
        return {}
    return {
        require_text(str(name), "the name of a score"): float(value)
        for name, value in scores.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def as_prompt(caption: str | Fields) -> str:
    """A caption as one text; fields in the order of FIELD_ORDER, each a sentence of its own."""
    if isinstance(caption, str):
        return caption

    def place(name: str) -> tuple[int, str]:
        plain = name.lower().replace(" ", "_").replace("-", "_")
        return (FIELD_ORDER.index(plain) if plain in FIELD_ORDER else len(FIELD_ORDER)), name

    texts = [caption[name] for name in sorted(caption, key=place)]
    return " ".join(text if text.endswith((".", "!", "?")) else f"{text}." for text in texts)
