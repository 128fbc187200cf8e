"""`sora fetch`: brings the weights and tokenizers that a run names from the hub, so that its nodes need no network."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sora_train.config import Config
    from sora_train.models.hub import Named


def fetch(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE.yaml] [KEY=VALUE]...")
    ] = None,
    config_dir: Annotated[
        Path | None, typer.Option(help="A folder with config groups and experiments of your own.")
    ] = None,
) -> None:
    """Bring what a run needs from the hub into its cache (HF_HOME), on a machine that has a network.

    \b
    sora fetch experiment=quickstart
    sora fetch my.yaml vae.path=Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    """
    from sora_train.config.job import compose_job

    print("\n".join(brought(compose_job(arguments or [], config_dir=config_dir).runs)))


def brought(configs: "tuple[Config, ...]") -> list[str]:
    """Bring it, and say of everything that a run (or its stages) names where it is.

    Raises:
        UserError: what a path means is not here, and is no model of the hub.
        Fault: the hub cannot be reached, or has failed.
    """
    from sora_train.models.hub import weights_named

    lines = {named: one(named) for cfg in configs for named in weights_named(cfg)}
    begun = {
        f"{key}={path}: {'is here' if here(path) else 'is not here (it is a run, not a model of the hub)'}"
        for cfg in configs
        for key, path in (("init.run", cfg.init.run), ("resume.run", cfg.resume.run))
        if path
    }
    return [*lines.values(), *sorted(begun)] or [
        "this run names no weights outside the package; its nodes need no network"
    ]


def here(run: str) -> bool:
    from sora_train.checkpoint.layout import split_step

    return split_step(run)[0].expanduser().is_dir()


def one(named: "Named") -> str:
    """Bring one model; returns what is said of it."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    from sora_train.errors import Fault, UserError
    from sora_train.models import hub

    told = f"{named.key}={named.path}"
    if not named.is_of_hub:
        if not Path(named.path).expanduser().exists():
            raise UserError(f"{told} is no folder here, and no owner/name of the hub; correct it")
        return f"{told}: is here, a folder"
    try:
        files = hub.listed(named)
        if not files:
            raise UserError(
                f"{told} has no folder {named.part} and no weights of its own on the hub; name another model"
            )
        missing = sum(file.size for file in files if not file.is_here)
        if missing:
            print(f"{told}: fetching {size(missing)} of {len(files)} files", flush=True)
        folder = hub.fetch(named, files)
    except (RepositoryNotFoundError, ValueError) as error:
        raise UserError(
            f"{told} is no model of the hub, or needs HF_TOKEN ({first_line(error)}); correct the name"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"{told} cannot be fetched while HF_HUB_OFFLINE is set; unset it where there is a network"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise Fault(
            f"{told} cannot be fetched ({first_line(error)}); try again where there is a network, or name a folder "
            "you have copied"
        ) from error
    total = size(sum(file.size for file in files))
    state = "fetched" if missing else "was there already"
    return f"{told}: {state}, {total} in {len(files)} files, {folder}"


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def size(count: int) -> str:
    """Bytes as a person reads them."""
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"
