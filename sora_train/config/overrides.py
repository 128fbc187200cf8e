"""Hydra's `key=value` arguments: read from a command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from sora_train.config.messages import unknown_key, validated
from sora_train.config.schema import keys
from sora_train.config.sections.base import Section
from sora_train.errors import ConfigError

SettingsT = TypeVar("SettingsT", bound=Section)


def parse_overrides(overrides: list[str]) -> list[Override]:
    """Parse arguments by Hydra's grammar. Raises ConfigError for one that does not follow it."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException:
            raise ConfigError(_unreadable(text)) from None
    return parsed


def parse_settings(cls: type[SettingsT], overrides: list[str]) -> SettingsT:
    """A section from arguments alone, for commands whose settings are not a run's. Raises ConfigError as `compose`."""
    known, values = list(keys(cls)), {}
    for override in parse_overrides([text_as_written(cls, text) for text in overrides]):
        if override.key_or_group not in known or override.is_add() or override.is_delete():
            raise ConfigError(unknown_key(override.key_or_group, known))
        if override.is_sweep_override():
            raise ConfigError(f"'{override.input_line}' names several values; give one")
        values[override.key_or_group] = override.value()
    return validated(cls, values)


def split_settings(cls: type[SettingsT], arguments: Sequence[str]) -> tuple[SettingsT, list[str]]:
    """A command's own settings, and the rest of its arguments, which are a run's overrides."""
    own: list[str] = []
    rest: list[str] = []
    for text in arguments:
        key, equals, _ = text.partition("=")
        (own if equals and key in cls.model_fields else rest).append(text)
    return parse_settings(cls, own), rest


def split_yaml_file(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The user's YAML file among a command's arguments, and the overrides."""
    files = [text for text in arguments if text.endswith((".yaml", ".yml")) and "=" not in text]
    if len(files) > 1:
        raise ConfigError(
            f"one YAML file describes a run, got {', '.join(files)}; name the others in its `defaults`"
        )
    return (Path(files[0]) if files else None), [text for text in arguments if text not in files]


def text_as_written(cls: type[Section], argument: str) -> str:
    """`key=value` with the value of a text key quoted: in a path, braces, commas and = mean nothing to Hydra."""
    name, _, value = argument.partition("=")
    key = keys(cls).get(name)
    quoted = "'" in value or '"' in value
    is_text = key is not None and key.field.annotation is str
    return argument if not is_text or quoted else f"{name}='{value}'"


def _unreadable(text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        return f"cannot read '{text}'; write key=value, for example train.steps=100"
    return f"""cannot read '{text}'; quote the value: '{key}="{value}"'"""
