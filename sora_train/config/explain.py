"""What `sora config` prints: the values of a run with their origins, the difference of two, one key explained."""

from pathlib import Path
from typing import Any

import yaml

from sora_train.config import Config
from sora_train.config.compose import DEFAULT, Composed, compose
from sora_train.config.messages import unknown_key
from sora_train.config.renamed import with_new_names
from sora_train.config.resumption import MEANING, resume_class
from sora_train.config.schema import MISSING, Key, flatten, keys, plain, sections
from sora_train.config.yaml_files import find_configs, load_yaml
from sora_train.errors import ConfigError

ABSENT = "(absent)"


def show(composed: Composed[Any]) -> str:
    """The whole configuration as YAML; a comment behind each value that is not a default says where it is from."""
    lines: list[tuple[str, str]] = []
    _walk(plain(composed.config), "", 0, composed.sources, lines)
    width = min(60, max(len(text) for text, _ in lines))
    return (
        "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in lines)
        + "\n"
    )


def diff(left: str, right: str, config_cls: type[Config] = Config) -> str:
    """The keys in which two configurations differ, one a line; each is named as in `values_of`."""
    a, b = flatten(values_of(left, config_cls)), flatten(values_of(right, config_cls))
    rows = [
        (key, scalar(a[key]) if key in a else ABSENT, scalar(b[key]) if key in b else ABSENT)
        for key in dict.fromkeys([*a, *b])
        if a.get(key, ABSENT) != b.get(key, ABSENT)
    ]
    if not rows:
        return f"{left} and {right} are the same\n"
    rows.insert(0, ("key", left, right))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "".join(f"{key:<{widths[0]}}  {one:<{widths[1]}}  {two}\n" for key, one, two in rows)


def explain(name: str, composed: Composed[Any]) -> str:
    """One key: what it means, what it may be, its default, its value and where that comes from."""
    cls = type(composed.config)
    known = keys(cls)
    key = known.get(name)
    if key is None:
        return _explain_group(name, cls)
    default = "(must be given)" if key.default == MISSING else scalar(plain(key.default))
    lines = [name, f"  {key.doc}", f"  allowed  {key.allowed}", f"  default  {default}"]
    if "[]" not in name:
        value = composed.config
        for part in name.split("."):
            value = getattr(value, part)
        lines.append(f"  value    {scalar(plain(value))}  ({_source(name, composed.sources)})")
    kind = resume_class(name)
    if kind is not None:
        lines.append(f"  resume   {kind}: {MEANING[kind]}")
    return "\n".join(lines) + "\n"


def values_of(place: str, config_cls: type[Config] = Config) -> dict[str, Any]:
    """The plain values of a run folder, a config.yaml, or what an override such as `experiment=NAME` composes to."""
    if "=" in place:
        return plain(compose([place], config_cls=config_cls).config)
    path = Path(place)
    file = path / "config.yaml" if path.is_dir() else path
    if not file.is_file() and (find_configs() / "experiment" / f"{place}.yaml").is_file():
        raise ConfigError(f"there is no file {place}; did you mean 'experiment={place}'?")
    # Runs of other versions must stay comparable, so their keys are not checked.
    return with_new_names(load_yaml(file))


def scalar(value: Any) -> str:
    """One value as YAML writes it on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _walk(
    tree: Any, path: str, depth: int, sources: dict[str, str], lines: list[tuple[str, str]]
) -> None:
    for name, value in tree.items():
        key = f"{path}{name}"
        if isinstance(value, dict) and value:
            lines.append((f"{'  ' * depth}{name}:", ""))
            _walk(value, key + ".", depth + 1, sources, lines)
            continue
        origin = _source(key, sources)
        lines.append(
            (f"{'  ' * depth}{name}: {scalar(value)}", "" if origin == DEFAULT else origin)
        )


def _source(key: str, sources: dict[str, str]) -> str:
    # A mapping-valued key has one origin for each of its entries.
    origins = {
        origin for leaf, origin in sources.items() if leaf == key or leaf.startswith(key + ".")
    }
    return ", ".join(sorted(origins)) or DEFAULT


def _explain_group(name: str, cls: type[Config]) -> str:
    section = dict(sections(cls)).get(name)
    options = group_options(name)
    if section is None and not options:
        raise ConfigError(
            unknown_key(name, [*keys(cls), *(path for path, _ in sections(cls)), "experiment"])
        )
    lines = [name]
    if section is not None:
        lines += [f"  {inner.name:<30} {inner.doc}" for inner in _members(name, cls)]
    if options:
        lines += [
            f"  choose with {name}=",
            *(f"    {option:<14} {about}" for option, about in options.items()),
        ]
    return "\n".join(lines) + "\n"


def _members(section: str, cls: type[Config]) -> list[Key]:
    return [key for name, key in keys(cls).items() if name.startswith(section + ".")]


def group_options(group: str) -> dict[str, str]:
    """The shipped options of a config group and the first comment line of each; empty if there is no such group."""
    abouts = {}
    for file in sorted((find_configs() / group).glob("*.yaml")):
        comments = [
            line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#")
        ]
        abouts[file.stem] = next((line for line in comments if not line.startswith("@package")), "")
    return abouts
