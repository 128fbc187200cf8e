"""The commands of `sora config`: values, where they come from, and what they mean."""

from pathlib import Path
from typing import Annotated

import typer

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
config_app = typer.Typer(help="Values, where they come from, and what they mean.")
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")]
ConfigDir = Annotated[
    Path | None, typer.Option(help="A folder with config groups and experiments of your own.")
]


@config_app.callback()
def _group() -> None:
    """Keeps it a group whatever it holds."""


@config_app.command("show", context_settings=OVERRIDES)
def config_show(arguments: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Print the whole configuration of a command line as YAML, with the origin of each chosen value.

    \b
    sora config show experiment=quickstart train.steps=50
    sora config show my.yaml
    """
    from sora_train.config.compose import compose, split_yaml_file
    from sora_train.config.explain import show

    yaml_file, overrides = split_yaml_file(list(arguments or []))
    print(show(compose(overrides, config_dir=config_dir, yaml_file=yaml_file)), end="")


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
    from sora_train.config.compose import compose, split_yaml_file
    from sora_train.config.explain import explain

    yaml_file, overrides = split_yaml_file(list(arguments or []))
    print(explain(key, compose(overrides, config_dir=config_dir, yaml_file=yaml_file)), end="")
