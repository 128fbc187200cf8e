"""The two sides of a comparison: what each is made of, and whether they can be compared at all."""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sora_train.base.files import read_json, write_atomically
from sora_train.config import Config
from sora_train.config.overrides import split_yaml_file
from sora_train.config.resumption import differences, resume_class
from sora_train.config.schema import flatten
from sora_train.errors import ConfigError, UserError
from sora_train.evaluation.paired import unlike
from sora_train.tools.sweep.axes import SweepRun
from sora_train.tools.sweep.local import Task, visible_gpus
from sora_train.tools.sweep.report.rows import UNSWEPT
from sora_train.tools.sweep.template import Template

PAIR = "ab.json"
LOG = "ab.log"
"""In a side's folder: its output, where both train at the same time."""


@dataclass(frozen=True)
class Side:
    """One of the two configurations, and the run of it."""

    name: str
    """`a` or `b`, the name of its folder."""
    asked: str
    """As it was given: a YAML file or overrides."""
    template: Template
    config: Config

    def task(self, folder: Path, *, log: bool) -> Task:
        run = SweepRun(self.name, {})
        command = self.template.command(run, folder, self.config)
        return Task(run, command, folder / self.name / LOG if log else None)


@dataclass(frozen=True)
class Pair:
    a: Side
    b: Side
    folder: Path
    differing: tuple[str, ...]
    """Keys in which the two differ."""
    at_once: int
    """2 where both train at the same time, 1 where one follows the other."""

    @property
    def steps(self) -> int:
        return self.a.config.train.steps


def pair_of(asked: tuple[str, str], shared: Sequence[str], folder: Path) -> Pair:
    """Both sides composed and checked, and written down in `folder`.

    Raises:
        ConfigError: a configuration that is wrong, or the two cannot be compared.
        UserError: `folder` holds another pair.
    """
    a, b = (side_of(name, text, shared, folder) for name, text in zip("ab", asked, strict=True))
    dotted = [flatten(side.config.model_dump(mode="json")) for side in (a, b)]
    changed = [
        key for key, _, _ in differences(dotted[0], dotted[1]) if not key.startswith(UNSWEPT)
    ]
    if not any(resume_class(key) != "free" for key in changed):
        raise ConfigError(
            f"'{asked[0]}' and '{asked[1]}' train the same run, so there is nothing to compare; change a key in one"
        )
    if a.config.train.steps != b.config.train.steps:
        raise ConfigError(
            f"train.steps is {a.config.train.steps} and {b.config.train.steps}; a pair is compared step by step, so "
            "give one for both"
        )
    why = unlike(dotted[0], dotted[1])
    if why:
        raise ConfigError(f"the two cannot be compared step by step: {why}")
    pair = Pair(a, b, folder, tuple(changed), _at_once(a.config))
    _write_down(pair, shared)
    return pair


def side_of(name: str, asked: str, shared: Sequence[str], folder: Path) -> Side:
    """`asked` is a YAML file with overrides behind it, or overrides alone, as on a command line."""
    yaml_file, own = split_yaml_file(shlex.split(asked))
    template = Template([*shared, *own], yaml_file=yaml_file)
    try:
        config = template.compose([f'run.dir="{folder / name}"'])
    except ConfigError as error:
        raise ConfigError(f"{name} ({asked}): {error}") from error
    if config.stages:
        raise ConfigError(
            f"{name} ({asked}) has stages, and a pair is compared step by step; give the configuration of one stage"
        )
    if config.run.threads == 0 and _at_once(config) == 2 and not visible_gpus():
        half = max(1, len(os.sched_getaffinity(0)) // 2)
        template = Template([*template.fixed, f"run.threads={half}"], yaml_file=yaml_file)
    return Side(name, asked, template, config)


def _at_once(config: Config) -> int:
    """Both share the machine's GPUs where these are enough for two, or its cores; else one follows the other."""
    gpus = visible_gpus()
    return 2 if not gpus or len(gpus) // 2 >= max(1, config.launch.ranks) else 1


def _write_down(pair: Pair, shared: Sequence[str]) -> None:
    """So that the same command goes on with it, and another one does not mix with it."""
    path = pair.folder / PAIR
    facts = {"a": pair.a.asked, "b": pair.b.asked, "shared": list(shared)}
    here = read_json(path) or {}
    for key, value in facts.items():
        if here.get(key, value) != value:
            raise UserError(
                f"{pair.folder} holds another pair, with {key}={here[key]!r}; give another --out, or the same pair to "
                "go on with it"
            )
    pair.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(here | facts, indent=1))
