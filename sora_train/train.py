"""From a command line to a run: compose -> Config -> Trainer(cfg).train().

    python -m sora_train.train [FILE.yaml] [--config-dir DIR] [-m] [key=value ...]

is the same job as `sora train`, and what torchrun starts on every rank. A project of one's own calls
`main(MyTrainer, MyConfig)`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sora_train.config import Config
from sora_train.config.compose import compose, split_yaml_file
from sora_train.errors import run_command
from sora_train.notices import listening
from sora_train.stages import train_stages
from sora_train.sweep import run_sweep

if TYPE_CHECKING:
    from sora_train.trainer import Trainer


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
    parser = argparse.ArgumentParser(prog="sora train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("-m", "--multirun", action="store_true")
    options, overrides = parser.parse_known_args(argv)
    yaml_file, overrides = split_yaml_file(overrides)
    if options.multirun:
        own = trainer_cls is not None or config_cls is not Config
        script = sys.argv[0] if own else None
        return run_sweep(overrides, config_cls, options.config_dir, yaml_file, script)
    place = {"config_dir": options.config_dir, "yaml_file": yaml_file}

    def composed(more: list[str]) -> Config:
        return compose([*overrides, *more], config_cls=config_cls, **place).config

    config = composed([])
    if trainer_cls is None:
        # Torch loads only once the config is known to be right.
        from sora_train.trainer import Trainer

        trainer_cls = Trainer
    with listening():
        if config.stages:
            train_stages(config, composed, trainer_cls)
        else:
            trainer_cls(config).train()
    return 0


if __name__ == "__main__":
    main()
