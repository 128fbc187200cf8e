"""Pydantic's errors as sentences: the dotted key, the value, what it must be, the remedy."""

import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic
from pydantic_core import ErrorDetails

from sora_train.config.renamed import new_name
from sora_train.config.schema import (
    MISSING,
    closest,
    describe,
    element_section,
    flatten,
    keys,
    section_of,
)
from sora_train.config.sections.base import Section
from sora_train.errors import ConfigError

T = TypeVar("T", bound=Section)
FEW = 12
"""Most keys that a sentence lists."""


def validated(cls: type[T], values: dict[str, Any], sources: Mapping[str, str] | None = None) -> T:
    """`cls` built from nested plain values.

    Raises ConfigError with one line for each unknown key, missing key and impossible value;
    `sources` (dotted key -> where its value was set) completes the lines.
    """
    missing = [
        key for key, value in flatten(values).items() if isinstance(value, str) and value == MISSING
    ]
    if missing:
        lines = [
            f"config key '{key}' has no value; add {key}=... to the command" for key in missing
        ]
        raise ConfigError("\n".join(lines))
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_sentences(cls, error, sources or {}))) from None


def unknown_key(name: str, known: list[str]) -> str:
    """The sentence for a key that does not exist."""
    new = new_name(name)
    if new is not None:
        return f"config key '{name}' is now called '{new}'; use that name"
    near = closest(name, known)
    listed = (
        f"known keys: {', '.join(known)}"
        if len(known) <= FEW
        else "`sora config show` lists every key"
    )
    remedy = f"did you mean '{near}'?" if near else listed
    return f"unknown config key '{name}'; {remedy}"


@dataclass(frozen=True)
class _Place:
    """Where an error points: the dotted path, what is declared there, and the constraints beside it."""

    path: str
    annotation: Any
    metadata: tuple[Any, ...]


def _sentences(
    cls: type[Section], error: pydantic.ValidationError, sources: Mapping[str, str]
) -> list[str]:
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False):
        place = _locate(cls, detail["loc"])
        # A union fails once for each of its members; one line is enough.
        lines.setdefault(
            place.path + str(detail["type"] == "extra_forbidden"),
            _sentence(cls, place, detail, sources),
        )
    return list(lines.values())


def _sentence(
    cls: type[Section], place: _Place, detail: ErrorDetails, sources: Mapping[str, str]
) -> str:
    where = _origin(place.path, sources)
    kind = detail["type"]
    if kind == "extra_forbidden":
        return unknown_key(place.path, _known(cls, place)) + where
    if kind == "missing":
        return f"config key '{place.path}' has no value; it must be {describe(place.annotation, place.metadata)}{where}"
    if kind in ("value_error", "assertion_error"):
        text = str(detail.get("ctx", {}).get("error", detail["msg"]))
        named = not place.path or place.path in text
        return (text if named else f"config key '{place.path}': {text}") + where
    value, inner = detail["input"], section_of(place.annotation)
    if inner is not None:
        known = ", ".join(inner.model_fields)
        return (
            f"config section '{place.path}' holds keys of its own ({known}), got {value!r}{where}"
        )
    allowed = describe(place.annotation, place.metadata)
    hint = _remedy(place, value)
    return f"config key '{place.path}' must be {allowed}, got {value!r}{hint}{where}"


def _known(cls: type[Section], place: _Place) -> list[str]:
    """The keys that may have been meant: all of the config, or those of a section that is named by its user."""
    parent, known = place.path.rpartition(".")[0], list(keys(cls))
    owner = section_of(place.annotation)
    listed = re.sub(r"\[\d+\]", "[]", parent)
    if owner is None or not parent or any(key.startswith(f"{listed}.") for key in known):
        return known
    return [f"{parent}.{name}" for name in owner.model_fields]


def _remedy(place: _Place, value: Any) -> str:
    options = [
        item
        for part in _members(place.annotation)
        if get_origin(part) is Literal
        for item in get_args(part)
    ]
    if isinstance(value, str):
        near = closest(value, [item for item in options if isinstance(item, str)])
        return f"; did you mean {near!r}?" if near else ""
    if place.annotation is str and value is not None:
        return f"""; quote it: '{place.path}="{value}"'"""
    return ""


def _origin(path: str, sources: Mapping[str, str]) -> str:
    key = path.split("[")[0]
    files = (
        source
        for name, source in sources.items()
        if (name == key or name.startswith(key + ".")) and source not in ("default", "command line")
    )
    return next((f" ({file})" for file in files), "")


def _locate(cls: type[Section], loc: tuple[int | str, ...]) -> _Place:
    """Follow pydantic's location as far as it names keys; labels of union members are dropped."""
    path = ""
    annotation: Any = cls
    metadata: tuple[Any, ...] = ()
    for item in loc:
        section = section_of(annotation) or next(
            filter(None, map(section_of, _members(annotation))), None
        )
        if isinstance(item, int):
            path += f"[{item}]"
            annotation, metadata = _element(annotation, item), ()
        elif get_origin(annotation) is dict:
            path += f".{item}"
            annotation, metadata = get_args(annotation)[1], ()
        elif section is not None and item in section.model_fields:
            field = section.model_fields[item]
            path += f".{item}" if path else item
            annotation, metadata = field.annotation, tuple(field.metadata)
        elif section_of(annotation) is not None:
            path += f".{item}" if path else item
            break
    return _Place(path, annotation, metadata)


def _members(annotation: Any) -> tuple[Any, ...]:
    return (
        get_args(annotation)
        if get_origin(annotation) in (Union, types.UnionType)
        else (annotation,)
    )


def _element(annotation: Any, index: int) -> Any:
    inner = element_section(annotation)
    if inner is not None:
        return inner
    args = get_args(annotation)
    if not args:
        return Any
    return args[0] if len(args) < 2 or args[1] is Ellipsis else args[min(index, len(args) - 1)]
