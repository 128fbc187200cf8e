"""A job: the configuration that a command line describes, with those of its stages, and the file that freezes it.

`sora launch` composes and checks a job once and freezes it in the run folder; every rank reads it from there, so that
nothing is composed again on the nodes. The file's name carries a digest of its bytes, so an edited file is noticed.
"""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sora_train.base.files import write_atomically
from sora_train.config import Config
from sora_train.config.compose import Composed, compose
from sora_train.config.messages import validated
from sora_train.config.overrides import split_yaml_file
from sora_train.config.renamed import with_new_names
from sora_train.config.stages import ComposeWith, compose_stages
from sora_train.config.yaml_files import load_yaml
from sora_train.errors import Fault, UserError

FOLDER = "launch"
"""Where frozen configurations lie in a run folder."""
DIGITS = 16

OPTIONS = argparse.ArgumentParser(prog="sora train", add_help=False, allow_abbrev=False)
OPTIONS.add_argument("--config-dir", type=Path)
OPTIONS.add_argument("-m", "--multirun", action="store_true")
OPTIONS.add_argument("--freeze", action="store_true")
OPTIONS.add_argument("--frozen", type=Path)


@dataclass(frozen=True)
class JobConfig:
    """A run, and its stages if it has any."""

    config: Config
    stages: tuple[Config, ...] = ()

    @property
    def runs(self) -> tuple[Config, ...]:
        """What is trained, in order: the stages, or the run itself where it has none."""
        return self.stages or (self.config,)


def split_script(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """A training file of the user's own that a command line begins with, if it does, and the arguments after it.

    Raises UserError where there is no such file.
    """
    if not (arguments and arguments[0].endswith(".py") and "=" not in arguments[0]):
        return None, list(arguments)
    if not Path(arguments[0]).is_file():
        raise UserError(f"there is no file {arguments[0]}; `sora init NAME` writes NAME/train.py")
    return Path(arguments[0]), list(arguments[1:])


def compose_arguments(
    arguments: Sequence[str],
    config_cls: type[Config] = Config,
    config_dir: Path | None = None,
    values: Mapping[str, Any] | None = None,
) -> Composed:
    """Compose a run from `[FILE.yaml] KEY=VALUE ...`. Raises ConfigError as `compose` does."""
    yaml_file, overrides = split_yaml_file(list(arguments))
    return compose(
        overrides, config_cls=config_cls, config_dir=config_dir, yaml_file=yaml_file, values=values
    )


def compose_job(
    argv: Sequence[str], config_cls: type[Config] = Config, config_dir: Path | None = None
) -> JobConfig:
    """The job that the arguments of `sora train` describe, composed and checked; with --frozen it is read.

    Args:
        config_dir: used where `argv` has no --config-dir.

    Raises:
        ConfigError: the configuration, or that of a stage, is wrong.
        UserError: --frozen stands beside overrides.
        Fault: the frozen file cannot be read, or was edited.
    """
    options, rest = OPTIONS.parse_known_args(argv)
    if options.frozen:
        if rest:
            raise UserError(
                f"--frozen {options.frozen} is a whole configuration, which '{rest[0]}' would change; launch the job "
                "again with that"
            )
        return thaw(options.frozen, config_cls)
    folder = options.config_dir or config_dir

    def compose_with(overrides: Sequence[str], values: Mapping[str, Any]) -> Config:
        return compose_arguments([*rest, *overrides], config_cls, folder, values).config

    return with_stages(compose_with([], {}), compose_with)


def with_stages(config: Config, compose_with: ComposeWith) -> JobConfig:
    """A run with its stages."""
    return JobConfig(config, compose_stages(config, compose_with) if config.stages else ())


def freeze(job: JobConfig) -> Path:
    """Write a job into its run folder; the same configuration is the same file.

    Raises OSError where the folder cannot be written.
    """
    values: dict[str, Any] = {"config": job.config.model_dump(mode="json")}
    if job.stages:
        values["stages"] = [stage.model_dump(mode="json") for stage in job.stages]
    text = yaml.safe_dump(values, sort_keys=False)
    folder = Path(job.config.run.dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"config-{digest(text)}.yaml"
    write_atomically(path, text)
    return path


def thaw(path: Path, config_cls: type[Config] = Config) -> JobConfig:
    """Read what `freeze` has written.

    Raises:
        Fault: the file is not there, or its digest is not the one in its name.
        ConfigError: the code that reads it has other keys than the code that froze it.
    """
    values = frozen_values(path)
    stages = tuple(
        validated(config_cls, with_new_names(stage)) for stage in values.get("stages", [])
    )
    return JobConfig(validated(config_cls, with_new_names(values["config"])), stages)


def frozen_values(path: Path) -> dict[str, Any]:
    """The plain values of a frozen configuration, of whatever class. Raises Fault as `thaw` does."""
    try:
        text = path.read_text()
    except OSError as error:
        raise Fault(
            f"the frozen configuration {path} cannot be read on this node: {error.strerror}; run.dir must lie on "
            "storage that all nodes see"
        ) from error
    expected = path.stem.removeprefix("config-")
    if digest(text) != expected:
        raise Fault(
            f"{path} has the digest {digest(text)}, and its name says {expected}: it was edited, or this node sees "
            "another file; launch the job again"
        )
    return load_yaml(path)


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=DIGITS // 2).hexdigest()
