"""Keys that had another name in an earlier version.

A command line or a YAML file with an old key is refused with the new one. Configurations that a run has written, in its
folder and in its checkpoints, are read under today's names.
"""

from typing import Any

RENAMED: dict[str, str] = {
    "loss_health": "spike_detection",
    "objective.i2v_fraction": "objective.conditioning.i2v",
}
"""Old dotted key, or section, and the new one."""


def new_name(key: str) -> str | None:
    """Today's name of a key, or None for a key that was not renamed."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(old + "."):
            return new + key.removeprefix(old)
    return None


def with_new_names(values: dict[str, Any]) -> dict[str, Any]:
    """The nested values of a configuration that a run has written, under today's names."""
    for old, new in RENAMED.items():
        values = _moved(values, old.split("."), new.split("."))
    return values


def _moved(values: dict[str, Any], old: list[str], new: list[str]) -> dict[str, Any]:
    values, value = _without(values, old)
    present = _without(values, new)[1]
    # An alias stood beside its key, and only one of the two could be set: an alias left at 0 says nothing.
    if value is None or (present is not None and not value):
        return values
    return _with(values, new, value)


def _without(values: dict[str, Any], path: list[str]) -> tuple[dict[str, Any], Any]:
    """A copy without the value at `path`, and that value, or None."""
    name, *rest = path
    if name not in values:
        return values, None
    if not rest:
        return {key: value for key, value in values.items() if key != name}, values[name]
    inner, value = _without(values[name], rest)
    return {**values, name: inner}, value


def _with(values: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    name, *rest = path
    return {**values, name: _with(values.get(name, {}), rest, value) if rest else value}
