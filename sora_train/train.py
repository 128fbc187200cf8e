"""From a command line to a run: compose -> Config -> Trainer(cfg).train().

    python -m sora_train.train [FILE.yaml] [--config-dir DIR] [-m] [key=value ...]

is the same job as `sora train`, and what torchrun starts on every rank. A project of one's own calls
`main(MyTrainer, MyConfig)`. `sora launch` composes once: with `--freeze` the configuration is written into the run
folder and nothing is trained, with `--frozen FILE` a rank reads it from there.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sora_train.config import Config
from sora_train.config.compose import compose, split_yaml_file
from sora_train.config.job import Frozen, freeze, thaw
from sora_train.config.stages import compose_stages, train_stages
from sora_train.errors import UserError, run_command
from sora_train.runtime.preemption import listening
from sora_train.tools.launch.check import check_job
from sora_train.tools.sweep.run import run_sweep

if TYPE_CHECKING:
    from sora_train.training.trainer import Trainer

OPTIONS = argparse.ArgumentParser(prog="sora train", add_help=False, allow_abbrev=False)
OPTIONS.add_argument("--config-dir", type=Path)
OPTIONS.add_argument("-m", "--multirun", action="store_true")
OPTIONS.add_argument("--freeze", action="store_true")
OPTIONS.add_argument("--frozen", type=Path)


def main(
    trainer_cls: "type[Trainer] | None" = None,
    config_cls: type[Config] = Config,
    argv: Sequence[str] | None = None,
) -> None:
    """Run the training that `argv` (the process's own arguments if None) describes, then exit."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.exit(run_command(lambda: train(trainer_cls, config_cls, arguments)))


def train(trainer_cls: "type[Trainer] | None", config_cls: type[Config], argv: list[str]) -> int:
    """As `main`, but returns the exit code and raises what goes wrong."""
    options, rest = OPTIONS.parse_known_args(argv)
    if options.multirun:
        own = trainer_cls is not None or config_cls is not Config
        yaml_file, overrides = split_yaml_file(rest)
        script = sys.argv[0] if own else None
        return run_sweep(overrides, config_cls, options.config_dir, yaml_file, script)
    frozen = described(argv, config_cls)
    if options.freeze:
        check_job(frozen)
        print(freeze(frozen))
        return 0
    if trainer_cls is None:
        # Torch loads only once the config is known to be right.
        from sora_train.training.trainer import Trainer

        trainer_cls = Trainer
    with listening():
        if frozen.stages:
            train_stages(frozen.config, frozen.stages, trainer_cls)
        else:
            trainer_cls(frozen.config).train()
    return 0


def described(argv: list[str], config_cls: type[Config] = Config) -> Frozen:
    """The run that a command line describes, with its stages, composed and checked; or read, where it was frozen."""
    options, rest = OPTIONS.parse_known_args(argv)
    yaml_file, overrides = split_yaml_file(rest)
    if options.frozen:
        if rest:
            raise UserError(
                f"--frozen {options.frozen} is a whole configuration, which '{rest[0]}' would change; launch the job "
                "again with that"
            )
        return thaw(options.frozen, config_cls)

    def composed(more: list[str]) -> Config:
        return compose(
            [*overrides, *more],
            config_cls=config_cls,
            config_dir=options.config_dir,
            yaml_file=yaml_file,
        ).config

    return with_stages(composed([]), composed)


def with_stages(config: Config, composed: Callable[[list[str]], Config]) -> Frozen:
    """A run and its stages, each `composed` with what it overrides."""
    return Frozen(config, compose_stages(config, composed) if config.stages else ())


if __name__ == "__main__":
    main()
