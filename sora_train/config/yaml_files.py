"""The YAML files of configurations: where the shipped ones are, which groups they form, and how one is read."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sora_train.base.text import NotText, read_text
from sora_train.errors import ConfigError

NO_GROUP = "sweep"
"""The folder beside the groups whose files are W&B's."""


def find_configs() -> Path:
    """The folder of shipped YAML files: inside an installed wheel, else beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_configs", package.parent / "configs"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError(f"the shipped configs are missing beside {package}; reinstall sora_train")


def list_groups(folders: Sequence[Path]) -> dict[str, list[str]]:
    """The config groups in `folders`, each with the names of its options, sorted."""
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for group in sorted(path for path in folder.iterdir() if path.is_dir()):
            if group.name != NO_GROUP:
                options = {path.stem for path in group.glob("*.yaml")}
                groups.setdefault(group.name, set()).update(options)
    return {group: sorted(options) for group, options in groups.items() if options}


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping, interpolations unresolved. Raises ConfigError with the file, the line and the fault."""
    try:
        text = read_text(path)
    except NotText as error:
        raise ConfigError(str(error)) from None
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}; check the name") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read as a config: {error.strerror or error}") from None
    values = parse_yaml(text, path)
    if values is not None and not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "one value"
        raise ConfigError(f"{path} must hold `key: value` lines, got {kind}")
    return values or {}


def parse_yaml(text: str, path: Path) -> Any:
    """What a YAML file's text holds, of whatever kind. Raises ConfigError with the file, the line and the fault."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_fault(path, error)) from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deep to be read; flatten it") from None


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads what OmegaConf, and so Hydra, reads: a key stands once, `1e-4` is a number, a date is text.

    OmegaConf's own loader is the one written in Python, which takes ten times as long.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != self.DEFAULT_SCALAR_TAG:
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _yaml_fault(path: Path, error: Exception) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = f" line {mark.line + 1}" if mark is not None else ""
    return f"{path}{line} is not valid YAML: {problem or str(error).strip().splitlines()[0]}"
