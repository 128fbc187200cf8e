"""Hydra composes the YAML files, the pydantic models check the result, and every value remembers its origin.

Every default is stated once, in the models: they enter the composition as one node that comes first, so that
any key may be set without `+` and a YAML file holds chosen values only. Nothing outside this file sees
a DictConfig.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from hydra import version as hydra_version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import (
    CachingConfigRepository,
    ConfigRepository,
    IConfigRepository,
)
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sora_train.config import Config
from sora_train.config.messages import unknown_key, validated
from sora_train.config.schema import closest, default_tree, flatten, keys, plain
from sora_train.config.sections.base import Section
from sora_train.errors import ConfigError

EVERY_KEY = "every_key"
"""Name under which configs/train.yaml takes in all keys at their defaults."""
FOREIGN = "sweep"
"""The folder beside the groups whose files are W&B's."""
DEFAULT = "default"
COMMAND_LINE = "command line"

ConfigT = TypeVar("ConfigT", bound=Config)
SettingsT = TypeVar("SettingsT", bound=Section)


@dataclass(frozen=True)
class Composed(Generic[ConfigT]):
    """A checked configuration and, for every dotted key, where its value comes from."""

    config: ConfigT
    sources: dict[str, str]


def compose(
    overrides: Iterable[str],
    *,
    config_cls: type[ConfigT] = Config,  # type: ignore[assignment]
    config_dir: Path | None = None,
    yaml_file: Path | None = None,
) -> Composed[ConfigT]:
    """The configuration of one run.

    `overrides` are Hydra's: `key=value`, `group=option`. `config_dir` holds groups and options of the user's own,
    which go before the shipped ones; `yaml_file` is an experiment anywhere on disk, whose `defaults` list may name
    shipped experiments and `override /group: option`.

    Raises ConfigError: one sentence a mistake, naming the dotted key or the file, the value and the remedy.
    """
    composer = _Composer(config_cls, config_dir, yaml_file)
    return composer.run(list(overrides))


def parse_overrides(overrides: list[str]) -> list[Override]:
    """Hydra's own reading of `key=value` arguments; ConfigError for what it cannot read."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException:
            raise ConfigError(_unreadable(text)) from None
    return parsed


def parse_settings(cls: type[SettingsT], overrides: list[str]) -> SettingsT:
    """A section from `key=value` arguments alone, for commands whose settings are not a run's; strict as `compose`."""
    known, values = list(keys(cls)), {}
    for override in parse_overrides([_text_as_written(cls, text) for text in overrides]):
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


def _text_as_written(cls: type[Section], argument: str) -> str:
    """`key=value` with the value of a text key quoted: in a path, braces, commas and = mean nothing to Hydra."""
    key, _, value = argument.partition("=")
    field = cls.model_fields.get(key)
    quoted = "'" in value or '"' in value
    return (
        argument if field is None or field.annotation is not str or quoted else f"{key}='{value}'"
    )


def split_yaml_file(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The user's YAML file among a command's arguments, and the overrides."""
    files = [text for text in arguments if text.endswith((".yaml", ".yml")) and "=" not in text]
    if len(files) > 1:
        raise ConfigError(
            f"one YAML file describes a run, got {', '.join(files)}; name the others in its `defaults`"
        )
    return (Path(files[0]) if files else None), [text for text in arguments if text not in files]


def find_configs() -> Path:
    """The folder of shipped YAML files: inside an installed wheel, else beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"the shipped configs are missing beside {package}; reinstall sora_train")


def read_config(path: Path, config_cls: type[ConfigT] = Config) -> ConfigT:  # type: ignore[assignment]
    """A resolved configuration as a run folder keeps it. `path` is the folder or its config.yaml."""
    file = path / "config.yaml" if path.is_dir() else path
    return validated(config_cls, load_yaml(file))


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; ConfigError names the file, the line and the fault."""
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}; check the name") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as a config: {error.strerror or error}") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(_yaml_fault(path, error)) from None
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"{path} must hold `key: value` lines, got a list")
    return OmegaConf.to_container(loaded, resolve=False)


class _Composer:
    """One composition: Hydra's loader over the search path, and the checks around it."""

    def __init__(self, config_cls: type[Config], config_dir: Path | None, yaml_file: Path | None):
        self.config_cls = config_cls
        self.yaml_file = yaml_file
        self.known = list(keys(config_cls))
        self.tree = default_tree(config_cls)
        hydra_version.setbase("1.3")
        Plugins.instance()  # registers the sources that Hydra reads configs from
        ConfigStore.instance().store(name=EVERY_KEY, node=self.tree)
        self.search_path = _search_path(config_dir)
        self.repository: IConfigRepository = ConfigRepository(self.search_path)
        self.groups = {group: self._options(group) for group in self._list_groups()}

    def run(self, overrides: list[str]) -> Composed:
        parsed = self._all_checked(parse_overrides(overrides))
        if self.yaml_file is not None:
            parsed += self._store_file(self.yaml_file, parsed)
        # Copies the ConfigStore as it is now, so only after the user's file is in it.
        self.repository = CachingConfigRepository(self.repository)
        try:
            defaults = create_defaults_list(
                self.repository, "train", parsed, prepend_hydra=False, skip_missing=False
            )
            loader = ConfigLoaderImpl(self.search_path)
            merged = loader._compose_config_from_defaults_list(defaults.defaults, self.repository)
            OmegaConf.set_struct(merged, True)
            loader._apply_overrides_to_config(defaults.config_overrides, merged)
            values = OmegaConf.to_container(merged, resolve=True)
            sources = self._sources(defaults.defaults, parsed, plain(values))
        except MissingConfigException as error:
            raise ConfigError(self._missing(error)) from None
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(_composition_fault(error)) from None
        return Composed(validated(self.config_cls, values, sources), sources)

    def _all_checked(self, overrides: list[Override]) -> list[Override]:
        checked, faults = [], []
        for override in overrides:
            try:
                checked.append(self._checked(override))
            except ConfigError as error:
                faults.append(str(error))
        if faults:
            raise ConfigError("\n".join(faults))
        return checked

    def _checked(self, override: Override) -> Override:
        key = override.key_or_group
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            raise ConfigError(
                f"'{override.input_line}' sets Hydra itself, which sora_train does not use; leave it out"
            )
        if override.is_sweep_override():
            raise ConfigError(
                f"'{override.input_line}' names several values; write -m for a run each, or key=[a,b] for a list"
            )
        if key in self.groups:
            return self._checked_group(override)
        top = key.split(".")[0]
        free_parent = next(
            (name for name in self._mappings() if key == name or key.startswith(name + ".")), None
        )
        if free_parent is not None and not override.is_add():
            return (
                parse_overrides([f"++{override.input_line}"])[0]
                if not override.is_delete()
                else override
            )
        if not override.is_add() and not self._exists(key):
            raise ConfigError(
                unknown_key(key, [*self.known, *self.groups, *self.config_cls.model_fields])
            )
        if override.is_add() and top not in self.config_cls.model_fields:
            raise ConfigError(unknown_key(key, [*self.known, *self.groups]))
        return override

    def _checked_group(self, override: Override) -> Override:
        value, group = override.value(), override.key_or_group
        if override.is_delete():
            return override
        if isinstance(value, list | dict):
            raise ConfigError(
                f"'{override.input_line}': '{group}' takes the name of one option: {self._list(group)}"
            )
        if value is None or str(value) not in self.groups[group]:
            value = override.get_value_element_as_str()
            near = closest(str(value), self.groups[group])
            remedy = f"did you mean '{near}'? " if near else ""
            raise ConfigError(
                f"config group '{group}' has no option '{value}'; {remedy}there are: {self._list(group)}"
            )
        return override

    def _exists(self, key: str) -> bool:
        """A key, a section, or an element of a list: `buckets.classes.0.pixels`."""
        if any(name == key or name.startswith(key + ".") for name in self.known):
            return True
        return any(part.isdigit() for part in key.split(".")[1:])

    def _mappings(self) -> list[str]:
        return [
            name for name, key in keys(self.config_cls).items() if isinstance(key.default, dict)
        ]

    def _list_groups(self) -> list[str]:
        return [
            group for group in self.repository.get_group_options("", None) if self._is_group(group)
        ]

    def _is_group(self, name: str) -> bool:
        return self.repository.group_exists(name) and name not in ("hydra", FOREIGN)

    def _options(self, group: str) -> list[str]:
        return self.repository.get_group_options(group, ObjectType.CONFIG)

    def _list(self, group: str) -> str:
        return ", ".join(self.groups[group])

    def _store_file(self, path: Path, overrides: list[Override]) -> list[Override]:
        """Make the user's file an option of the group `experiment`; returns what chooses it."""
        if any(override.key_or_group == "experiment" for override in overrides):
            raise ConfigError(
                f"{path} and experiment= are both given; name the experiment in the file's `defaults` list"
            )
        name = f"file_{path.stem}".replace(" ", "_").replace("=", "_")
        ConfigStore.instance().store(
            group="experiment", name=name, node=load_yaml(path), package="_global_"
        )
        return parse_overrides([f"experiment='{name}'"])

    def _sources(
        self, defaults: list[ResultDefault], parsed: list[Override], values: dict[str, Any]
    ) -> dict[str, str]:
        origin = dict.fromkeys(flatten(self.tree), DEFAULT)
        for chosen in defaults:
            path = chosen.config_path
            if path is None or path == EVERY_KEY:
                continue
            result = self.repository.load_config(path)
            assert result is not None, f"{path} was composed a moment ago"
            package = (chosen.package or "").replace("_global_", "").strip(".")
            name = self._source_name(path, result.path)
            tree = OmegaConf.to_container(result.config, resolve=False)
            for leaf in flatten(tree):
                origin[f"{package}.{leaf}" if package else leaf] = name
        for override in parsed:
            if override.key_or_group in self.groups:
                continue
            for leaf in flatten(values):
                if leaf == override.key_or_group or _inside(leaf, override.key_or_group):
                    origin[leaf] = COMMAND_LINE
        return {leaf: origin.get(leaf, DEFAULT) for leaf in flatten(values)}

    def _source_name(self, config_path: str, source: str) -> str:
        if source.startswith("file://"):
            folder = Path(source.removeprefix("file://"))
            return (
                f"configs/{config_path}.yaml"
                if folder == find_configs()
                else f"{folder / config_path}.yaml"
            )
        return str(self.yaml_file) if self.yaml_file is not None else config_path

    def _missing(self, error: MissingConfigException) -> str:
        name = error.missing_cfg_file or ""
        group, _, option = name.rpartition("/")
        options = self.groups.get(group, list(error.options or []))
        near = closest(option, options)
        where = f"{self.yaml_file}: " if self.yaml_file is not None else ""
        remedy = f"did you mean '{near}'? " if near else ""
        there = (
            f"there are: {', '.join(options)}"
            if options
            else f"groups are: {', '.join(self.groups)}"
        )
        return f"{where}there is no config '{name}'; {remedy}{there}"


def _inside(leaf: str, key: str) -> bool:
    """Whether setting `key` changed `leaf`: a section around it, or an element of the list it holds."""
    return leaf.startswith(key + ".") or key.startswith(leaf + ".")


def _search_path(config_dir: Path | None) -> ConfigSearchPathImpl:
    search = ConfigSearchPathImpl()
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ConfigError(f"--config-dir {config_dir} is not a folder; check the path")
        search.append("user", f"file://{os.path.abspath(config_dir)}")
    search.append("main", f"file://{find_configs()}")
    search.append("schema", "structured://")
    return search


def _unreadable(text: str) -> str:
    key, equals, value = text.partition("=")
    if not equals:
        return f"cannot read '{text}'; write key=value, for example train.steps=100"
    return f"""cannot read '{text}'; quote the value: '{key}="{value}"'"""


def _yaml_fault(path: Path, error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = f" line {mark.line + 1}" if mark is not None else ""
    return f"{path}{line} is not valid YAML: {problem or _first_line(error)}"


def _composition_fault(error: Exception) -> str:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    return f"the configuration does not compose: {_first_line(root)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
