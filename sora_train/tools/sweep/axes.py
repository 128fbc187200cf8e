"""The axes of a sweep, parsed from its command line by Hydra's grammar, and its runs: all combinations of values."""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hydra.core.override_parser.types import IntervalSweep, Override

from sora_train.config.overrides import parse_overrides
from sora_train.errors import ConfigError

MAX_ID = 80
"""Longest folder name a run gets before a hash shortens it."""


@dataclass(frozen=True)
class Interval:
    """All numbers between two, for a search."""

    low: float
    high: float
    log: bool
    whole: bool

    def __str__(self) -> str:
        text = f"interval({self.low:g},{self.high:g})"
        text = f"int({text})" if self.whole else text
        return f"tag(log,{text})" if self.log else text


@dataclass(frozen=True)
class Axis:
    """A swept key: its values as an override writes them, or an interval."""

    key: str
    values: tuple[str, ...] = ()
    interval: Interval | None = None

    @property
    def first(self) -> str:
        return self.values[0] if self.interval is None else f"{self.interval.low:g}"

    @property
    def written(self) -> list[str]:
        return [str(self.interval)] if self.interval else list(self.values)


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: the name of its folder, and the values it has of each axis."""

    id: str
    values: Mapping[str, str]

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.values.items()]


def split(overrides: Sequence[str]) -> tuple[list[str], list[Axis]]:
    """The overrides that all runs share, and the axes. Raises ConfigError for what cannot be swept."""
    fixed, axes = [], []
    for text, override in zip(overrides, parse_overrides(list(overrides)), strict=True):
        if not override.is_sweep_override():
            fixed.append(text)
        elif override.key_or_group == "run.dir":
            raise ConfigError(
                f"'{text}': a sweep names its folders itself, below run.dir; give one run.dir"
            )
        elif override.key_or_group.startswith(("sweep.", "launch.")):
            raise ConfigError(f"'{text}' is of all runs of a sweep; give one value")
        else:
            axes.append(axis_of(text, override))
    return fixed, axes


def axis_of(text: str, override: Override) -> Axis:
    key = override.get_key_element()
    if override.is_discrete_sweep():
        return Axis(key, tuple(dict.fromkeys(map(str, override.sweep_string_iterator()))))
    value = override.value()
    if not isinstance(value, IntervalSweep):
        raise ConfigError(
            f"'{text}' cannot be enumerated; list its values: {override.key_or_group}=a,b,c"
        )
    low, high = value.start, value.end
    assert low is not None and high is not None
    log = "log" in value.tags
    if not low < high or (log and low <= 0):
        raise ConfigError(
            f"'{text}' must go from a smaller{' positive' if log else ''} number to a larger one"
        )
    return Axis(key, interval=Interval(low, high, log, isinstance(low, int)))


def grid(axes: Sequence[Axis]) -> list[SweepRun]:
    """Every combination. Raises ConfigError for an interval, which has no end of them."""
    for axis in axes:
        if axis.interval:
            raise ConfigError(
                f"'{axis.key}={axis.interval}' cannot be enumerated; list its values ({axis.key}=a,b,c), or search "
                "with sweep.method=tpe"
            )
    chosen = itertools.product(*(axis.values for axis in axes))
    names = [axis.key for axis in axes]
    runs = [dict(zip(names, values, strict=True)) for values in chosen]
    return [SweepRun(run_id(values), values) for values in runs]


def run_id(values: Mapping[str, str]) -> str:
    """A folder's name from the swept values, the same whatever their order on the command line."""
    text = ",".join(sorted(f"{key}={value}" for key, value in values.items())) or "only"
    name = re.sub(r"[^A-Za-z0-9.,=_-]+", "-", text)
    if name == text and len(name) <= MAX_ID:
        return name
    return f"{name[:MAX_ID]}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
