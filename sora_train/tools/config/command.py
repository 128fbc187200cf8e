"""`sora config` and `sora init`: values, where they come from and what they mean; and a project of one's own."""

from pathlib import Path
from typing import Annotated

import typer

from sora_train.tools.terminal import OVERRIDES, ConfigDir, Overrides, command_group

config_app = command_group("Values, where they come from, and what they mean.")


@config_app.command("show", context_settings=OVERRIDES)
def config_show(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Print the whole configuration of a command line as YAML, with the origin of each chosen value.

    \b
    sora config show experiment=quickstart train.steps=50
    sora config show my.yaml
    """
    from sora_train.config.explain import show
    from sora_train.config.job import compose_arguments

    print(show(compose_arguments(arguments or [], config_dir=config_dir)), end="")


@config_app.command("diff")
def config_diff(
    left: Annotated[str, typer.Argument(metavar="A")],
    right: Annotated[str, typer.Argument(metavar="B")],
) -> None:
    """Print the keys in which two configurations differ: run folders, config.yaml files or experiment=NAME.

    \b
    sora config diff runs/a runs/b
    sora config diff runs/a experiment=quickstart
    """
    from sora_train.config.explain import diff

    print(diff(left, right), end="")


@config_app.command("explain", context_settings=OVERRIDES)
def config_explain(
    key: Annotated[str, typer.Argument(metavar="KEY")],
    arguments: Overrides = None,
    config_dir: ConfigDir = None,
) -> None:
    """Explain a key, a section or a group; overrides after it tell of which run.

    \b
    sora config explain data.cache
    sora config explain model
    sora config explain optim.lr experiment=quickstart
    """
    from sora_train.config.explain import explain
    from sora_train.config.job import compose_arguments

    print(explain(key, compose_arguments(arguments or [], config_dir=config_dir)), end="")


def init(name: Annotated[str, typer.Argument(metavar="NAME", help="Folder to create.")]) -> None:
    """Start a project of your own: a train.py of some 15 lines and a my.yaml of about ten.

    \b
    sora init my_project
    sora train my_project/train.py my_project/my.yaml
    """
    from sora_train.tools.config.project import create

    print(create(Path(name)))
