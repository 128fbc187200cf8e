"""The configuration as a list of documented keys, read off the pydantic models themselves.

Composition, `sora config explain`, the reference in docs/ and the error messages all walk this list, so a
key is declared once: its type, bounds, default and docstring in its section.
"""

import difflib
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from sora_train.config.sections.base import Section

MISSING = "???"
"""OmegaConf's mark of a key that must be given."""

_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts", bool: "truth values"}


@dataclass(frozen=True)
class Key:
    """One key of the configuration. `name` is dotted; `[]` marks the elements of a list of sections."""

    name: str
    field: FieldInfo
    default: Any
    holder: type[Section]

    @property
    def doc(self) -> str:
        return " ".join((self.field.description or "").split())

    @property
    def allowed(self) -> str:
        return describe(self.field.annotation, self.field.metadata)


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds directly, or None for a value."""
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def element_section(annotation: Any) -> type[Section] | None:
    """The section that the elements of a list-valued field are, or None."""
    if get_origin(annotation) in (tuple, list) and get_args(annotation):
        return section_of(_bare(get_args(annotation)[0]))
    return None


def keys(cls: type[Section], prefix: str = "", default: Section | None = None) -> dict[str, Key]:
    """Every key below `cls` in the order of declaration, sections themselves left out."""
    named: dict[str, Key] = {}
    for name, field in cls.model_fields.items():
        value = getattr(default, name) if default is not None else _default(field)
        inner, element = section_of(field.annotation), element_section(field.annotation)
        if inner is not None:
            named |= keys(
                type(value) if isinstance(value, inner) else inner,
                f"{prefix}{name}.",
                value if isinstance(value, Section) else None,
            )
            continue
        named[prefix + name] = Key(prefix + name, field, value, cls)
        if element is not None:
            named |= keys(element, f"{prefix}{name}[].")
    return named


def default_tree(cls: type[Section]) -> dict[str, Any]:
    """Nested plain values: every key at its default, `???` where a key has none."""
    tree: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        value, inner = _default(field), section_of(field.annotation)
        tree[name] = default_tree(inner) if inner and value == MISSING else plain(value)
    return tree


def sections(cls: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """(dotted name, class) of `cls` and every section below it; the root's name is empty."""
    yield prefix, cls
    for name, field in cls.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            yield from sections(inner, f"{prefix}.{name}" if prefix else name)


def plain(value: Any) -> Any:
    """Sections as dicts and tuples as lists, all the way down: what YAML can hold."""
    if isinstance(value, Section):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def overlaid(base: Any, values: Any) -> Any:
    """Nested plain values over `base`: mappings are merged key by key, everything else is replaced."""
    if isinstance(base, dict) and isinstance(values, dict):
        return base | {key: overlaid(base.get(key), value) for key, value in values.items()}
    return values


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted leaf keys of nested dicts; lists and empty dicts are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What a value must be, in words: "a whole number of at least 1", "one of 'a', 'b'"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe(args[0], args[1:])
    if origin is Literal:
        values = ", ".join(repr(value) for value in args)
        return f"one of {values}" if len(args) > 1 else values
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin in (tuple, list):
        return _describe_list(args) + _bounds(metadata)
    if origin is dict or annotation is dict:
        values = f", each value {describe(args[1])}" if args and args[1] is not Any else ""
        return f"a mapping{values}"
    if section_of(annotation) is not None:
        return "a section"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation))) + _bounds(
        metadata
    )


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known dotted name that `word` most probably means, or None."""
    known = list(known)
    parent, _, tail = word.rpartition(".")
    siblings = {
        name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent
    }
    near = difflib.get_close_matches(tail, siblings, n=1)
    if near:
        return siblings[near[0]]
    elsewhere = [name for name in known if name.rpartition(".")[2] == tail]
    if len(elsewhere) == 1:
        return elsewhere[0]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    if near:
        return near[0]
    tails = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(tail, tails, n=1, cutoff=0.75)
    return tails[near[0]] if near else None


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`did you mean NAME? `, the name behind `prefix`; empty where none is close."""
    near = closest(word, known)
    return f"did you mean {prefix}{near}? " if near else ""


def _default(field: FieldInfo) -> Any:
    return MISSING if field.is_required() else field.get_default(call_default_factory=True)


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _describe_list(args: tuple[Any, ...]) -> str:
    inner = _bare(args[0]) if args else str
    plural = "sections" if section_of(inner) else _PLURALS.get(inner, describe(inner))
    if len(args) > 1 and args[-1] is not Ellipsis:
        return f"a list of {len(args)} {plural}"
    return f"a list of {plural}"


def _bounds(metadata: Iterable[Any]) -> str:
    words, low, high = [], None, None
    for item in _constraints(metadata):
        match item:
            case annotated_types.Ge():
                low = item.ge
            case annotated_types.Le():
                high = item.le
            case annotated_types.Gt():
                words.append(f"above {item.gt}")
            case annotated_types.Lt():
                words.append(f"below {item.lt}")
            case annotated_types.MultipleOf():
                words.append(f"a multiple of {item.multiple_of}")
            case annotated_types.MinLen():
                words.append(f"with at least {item.min_length} entries")
            case annotated_types.MaxLen():
                words.append(f"with at most {item.max_length} entries")
    if low is not None and high is not None:
        words.insert(0, f"from {low} to {high}")
    elif low is not None or high is not None:
        words.insert(0, f"of at least {low}" if low is not None else f"of at most {high}")
    return "".join(" " + word if i == 0 else ", " + word for i, word in enumerate(words))


def _constraints(metadata: Iterable[Any]) -> Iterator[Any]:
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else (item,)
