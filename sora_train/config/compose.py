"""Hydra chooses the YAML files of a run, the pydantic models check the result, and every value remembers its origin.

Every default is stated once, in the models. They are the lowest layer of a composition, so any key may be set without
`+`, and a YAML file holds chosen values only. Nothing outside this file sees a DictConfig.

Of Hydra, its public `ConfigLoader` says which files a run is made of and in which order. `hydra.compose()` does not say
that, so nothing could tell where a value comes from; it also takes Hydra's own configuration and every default of ours
through its loader, which makes a composition twice as slow.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sora_train.config import Config
from sora_train.config.messages import unknown_key, validated
from sora_train.config.overrides import parse_overrides
from sora_train.config.schema import closest, default_tree, flatten, keys, overlaid
from sora_train.config.yaml_files import find_configs, list_groups, load_yaml
from sora_train.errors import ConfigError

PRIMARY = "train"
"""The file that every composition begins with, configs/train.yaml."""
EVERY_KEY = "every_key"
"""Name under which configs/train.yaml lists the defaults of the models."""
DEFAULT = "default"
COMMAND_LINE = "command line"

ConfigT = TypeVar("ConfigT", bound=Config)


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
    values: Mapping[str, Any] | None = None,
) -> Composed[ConfigT]:
    """The configuration of one run.

    Args:
        overrides: Hydra's `key=value` and `group=option`.
        config_dir: a folder with groups and options of the user's own, which go before the shipped ones.
        yaml_file: an experiment anywhere on disk; its `defaults` list may name shipped experiments and
            `override /group: option`.
        values: nested as in a YAML file; they count after the overrides.

    Raises:
        ConfigError: one sentence a mistake, with the dotted key or the file, the value and the remedy.
    """
    composer = _Composer(config_cls, config_dir, yaml_file)
    return composer.run(list(overrides), dict(values or {}))


@dataclass(frozen=True)
class _Layer:
    """The values of one YAML file, nested from the root of the configuration, and the file's name in messages."""

    name: str
    tree: dict[str, Any]


class _Composer:
    """One composition: the files that Hydra chooses, merged in its order, and the checks around it."""

    def __init__(self, config_cls: type[Config], config_dir: Path | None, yaml_file: Path | None):
        if config_dir is not None and not config_dir.is_dir():
            raise ConfigError(f"--config-dir {config_dir} is not a folder; check the path")
        self.config_cls = config_cls
        self.yaml_file = yaml_file
        self.folders = [*([config_dir.absolute()] if config_dir else []), find_configs()]
        self.groups = list_groups(self.folders)
        known = keys(config_cls)
        self.known = list(known)
        # Mappings, such as `vae.arch`, take any key.
        self.mappings = [name for name, key in known.items() if isinstance(key.default, dict)]

    def run(self, overrides: list[str], values: dict[str, Any]) -> Composed:
        parsed = self._checked(parse_overrides(overrides), list(flatten(values)))
        choices = [each for each in parsed if each.key_or_group in self.groups]
        settings = [each for each in parsed if each.key_or_group not in self.groups]
        if self.yaml_file is not None:
            choices += self._store_file(self.yaml_file, choices)
        try:
            layers = [self._layer(file) for file in self._choose_files(choices)]
            trees = (layer.tree for layer in layers)
            merged = OmegaConf.create(reduce(overlaid, trees, default_tree(self.config_cls)))
            for override in settings:
                _apply(override, merged)
            merged.merge_with(values)
            resolved = OmegaConf.to_container(merged, resolve=True)
        except MissingConfigException as error:
            raise ConfigError(self._missing(error)) from None
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(_composition_fault(error)) from None
        set_keys = [*(each.key_or_group for each in settings), *flatten(values)]
        sources = _sources(layers, set_keys, list(flatten(resolved)))
        return Composed(validated(self.config_cls, resolved, sources), sources)

    # -- overrides ------------------------------------------------------------------------------------

    def _checked(self, overrides: list[Override], set_keys: list[str]) -> list[Override]:
        faults = [fault for each in overrides if (fault := self._fault(each))]
        faults += [self._unknown(key) for key in set_keys if not self._exists(key)]
        if faults:
            raise ConfigError("\n".join(faults))
        return overrides

    def _fault(self, override: Override) -> str:
        """What is wrong with an override, or an empty string."""
        key, text = override.key_or_group, override.input_line
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            return f"'{text}' sets Hydra itself, which sora_train does not use; leave it out"
        if override.is_sweep_override():
            return (
                f"'{text}' names several values; write -m for a run each, or key=[a,b] for a list"
            )
        if key in self.groups:
            return self._option_fault(override)
        # A section of a project's own may take more keys than it declares; `+` says that one is meant.
        added = override.is_add() and key.split(".")[0] in self.config_cls.model_fields
        if not added and not self._exists(key):
            return self._unknown(key)
        return ""

    def _unknown(self, key: str) -> str:
        return unknown_key(key, [*self.known, *self.groups, *self.config_cls.model_fields])

    def _option_fault(self, override: Override) -> str:
        value, group = override.value(), override.key_or_group
        options = self.groups[group]
        listed = ", ".join(options)
        if override.is_delete() or str(value) in options:
            return ""
        if isinstance(value, list | dict):
            return f"'{override.input_line}': '{group}' takes the name of one option: {listed}"
        name = override.get_value_element_as_str()
        near = closest(name, options)
        remedy = f"did you mean '{near}'? " if near else ""
        return f"config group '{group}' has no option '{name}'; {remedy}there are: {listed}"

    def _exists(self, key: str) -> bool:
        """A key, a section, an entry of a mapping, or an element of a list: `buckets.classes.0.pixels`."""
        if any(name == key or name.startswith(key + ".") for name in self.known):
            return True
        if any(key.startswith(name + ".") for name in self.mappings):
            return True
        return any(part.isdigit() for part in key.split(".")[1:])

    # -- files ----------------------------------------------------------------------------------------

    def _store_file(self, path: Path, choices: list[Override]) -> list[Override]:
        """Make the user's file an option of the group `experiment`; returns the override that chooses it."""
        if any(override.key_or_group == "experiment" for override in choices):
            raise ConfigError(
                f"{path} and experiment= are both given; name the experiment in the file's `defaults` list"
            )
        name = f"file_{path.stem}".replace(" ", "_").replace("=", "_")
        ConfigStore.instance().store(
            group="experiment", name=name, node=load_yaml(path), package="_global_"
        )
        return parse_overrides([f"experiment='{name}'"])

    def _choose_files(self, choices: list[Override]) -> list[ResultDefault]:
        """The files that the run is made of, in the order in which they are merged."""
        arguments = [str(override.input_line) for override in choices]
        # The models' defaults are merged by `run`: Hydra would copy all of them several times.
        ConfigStore.instance().store(name=EVERY_KEY, node={})
        if len(self.folders) > 1:
            shipped = QuotedString(f"file://{find_configs()}", Quote.double).with_quotes()
            arguments.append(f"hydra.searchpath=[{shipped}]")
            # Hydra looks for its first file before it knows of a second folder.
            ConfigStore.instance().store(
                name=PRIMARY, node=load_yaml(find_configs() / f"{PRIMARY}.yaml")
            )
        with initialize_config_dir(str(self.folders[0]), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            chosen = loader.compute_defaults_list(PRIMARY, arguments, RunMode.RUN).defaults
        return [file for file in chosen if not _is_hydras_own(file)]

    def _layer(self, file: ResultDefault) -> _Layer:
        for folder in self.folders:
            path = folder / f"{file.config_path}.yaml"
            if path.is_file():
                shipped = folder == find_configs()
                name = f"configs/{file.config_path}.yaml" if shipped else str(path)
                break
        else:
            assert self.yaml_file is not None, f"{file.config_path} was chosen and is nowhere"
            path, name = self.yaml_file, str(self.yaml_file)
        tree = {key: value for key, value in load_yaml(path).items() if key != "defaults"}
        for section in reversed((file.package or "").split(".")):
            tree = {section: tree} if section else tree
        return _Layer(name, tree)

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


def _apply(override: Override, tree: DictConfig) -> None:
    key, value = override.key_or_group, override.value()
    if not override.is_delete():
        OmegaConf.update(tree, key, value, merge=True, force_add=True)
        return
    section, _, name = key.rpartition(".")
    parent = OmegaConf.select(tree, section) if section else tree
    if not OmegaConf.is_dict(parent) or name not in parent:
        raise ConfigError(f"'{override.input_line}' removes a key that has no value; leave it out")
    if value not in (None, parent[name]):
        raise ConfigError(
            f"'{override.input_line}' removes another value than {parent[name]!r}; write ~{key}"
        )
    del parent[name]


def _sources(layers: list[_Layer], set_keys: list[str], leaves: list[str]) -> dict[str, str]:
    """Where the value of each leaf comes from: the last layer that sets it, or the command line."""
    origin = {leaf: layer.name for layer in layers for leaf in flatten(layer.tree)}
    for key in set_keys:
        origin |= {leaf: COMMAND_LINE for leaf in leaves if _changes(key, leaf)}
    return {leaf: origin.get(leaf, DEFAULT) for leaf in leaves}


def _changes(key: str, leaf: str) -> bool:
    """Whether setting `key` changes `leaf`: the same key, a section around it, or an element of the list it holds."""
    return leaf == key or leaf.startswith(key + ".") or key.startswith(leaf + ".")


def _is_hydras_own(file: ResultDefault) -> bool:
    path = file.config_path
    return path is None or path == EVERY_KEY or path.startswith("hydra/")


def _composition_fault(error: Exception) -> str:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    return f"the configuration does not compose: {lines[0] if lines else type(root).__name__}"
