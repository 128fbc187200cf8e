"""The part that all runs of a sweep share: how a run is composed, and the command that trains it."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_train.config import Config
from sora_train.config.compose import compose
from sora_train.errors import ConfigError
from sora_train.tools.sweep.axes import Axis, SweepRun


@dataclass(frozen=True)
class Template:
    fixed: list[str]
    config_cls: type[Config] = Config
    config_dir: Path | None = None
    yaml_file: Path | None = None
    script: str | None = None
    """A training file of one's own; None for `sora_train.train`."""

    def compose(self, more: Sequence[str] = (), values: Mapping[str, Any] | None = None) -> Config:
        return compose(
            [*self.fixed, *more],
            config_cls=self.config_cls,
            config_dir=self.config_dir,
            yaml_file=self.yaml_file,
            values=values,
        ).config

    def base(self, axes: Sequence[Axis]) -> Config:
        """What all runs share; with the first value of each axis where it is none without, since an axis is needed.

        Raises ConfigError for what is wrong at that point, too.
        """
        try:
            return self.compose()
        except ConfigError:
            first = [f"{axis.key}={axis.first}" for axis in axes]
            return self.compose(first)

    def overrides_of(self, run: SweepRun, folder: Path) -> list[str]:
        """The overrides of one run, beyond those that all share."""
        return [*run.overrides, f'run.dir="{folder / run.id}"']

    def compose_all(self, runs: Sequence[SweepRun], folder: Path) -> dict[str, Config]:
        """The configuration of each run. ConfigError for a wrong one, with the run's name but for the first."""
        configs: dict[str, Config] = {}
        for run in runs:
            try:
                configs[run.id] = self.compose(self.overrides_of(run, folder))
            except ConfigError as error:
                raise ConfigError(f"{run.id}: {error}" if configs else str(error)) from error
        return configs

    def command(self, run: SweepRun, folder: Path, config: Config) -> list[str]:
        """Train one run here, in a process of its own, or in several where `launch.ranks` says so."""
        launcher = ["-m", "sora_train", "launch", "local"]
        start = [self.script] if self.script else ["-m", "sora_train.train"]
        if config.launch.ranks > 1:
            start = [*launcher, *([self.script] if self.script else [])]
        options = [str(self.yaml_file)] if self.yaml_file is not None else []
        if self.config_dir is not None:
            options += ["--config-dir", str(self.config_dir)]
        return [sys.executable, *start, *options, *self.fixed, *self.overrides_of(run, folder)]
