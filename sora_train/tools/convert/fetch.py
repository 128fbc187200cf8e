"""Fetches the weights and tokenizers that a run names from the hub, so that its nodes need no network."""

from pathlib import Path

from sora_train.checkpoint.layout import split_step
from sora_train.config import Config
from sora_train.errors import Fault, UserError
from sora_train.models import hub


def fetch_weights(configs: tuple[Config, ...]) -> list[str]:
    """Fetch what a run or its stages name; returns a line for each that says where it is.

    Raises:
        UserError: a path is not here, and is no model of the hub.
        Fault: the hub cannot be reached, or has failed.
    """
    lines = {named: fetch_model(named) for cfg in configs for named in hub.weights_named(cfg)}
    runs = {
        f"{key}={path}: {'is here' if is_here(path) else 'is not here (it is a run, not a model of the hub)'}"
        for cfg in configs
        for key, path in (("init.run", cfg.init.run), ("resume.run", cfg.resume.run))
        if path
    }
    return [*lines.values(), *sorted(runs)] or [
        "this run names no weights outside the package; its nodes need no network"
    ]


def is_here(run: str) -> bool:
    return split_step(run)[0].expanduser().is_dir()


def fetch_model(named: hub.Named) -> str:
    """Fetch one model; returns a line that says where it is."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    setting = f"{named.key}={named.path}"
    if not named.is_of_hub:
        if not Path(named.path).expanduser().exists():
            raise UserError(
                f"{setting} is no folder here, and no owner/name of the hub; correct it"
            )
        return f"{setting}: is here, a folder"
    try:
        files = hub.listed(named)
        if not files:
            raise UserError(
                f"{setting} has no folder {named.part} and no weights of its own on the hub; name another model"
            )
        missing = sum(file.size for file in files if not file.is_here)
        if missing:
            print(f"{setting}: fetching {size(missing)} of {len(files)} files", flush=True)
        folder = hub.fetch(named, files)
    except (RepositoryNotFoundError, ValueError) as error:
        raise UserError(
            f"{setting} is no model of the hub, or needs HF_TOKEN ({first_line(error)}); correct the name"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"{setting} cannot be fetched while HF_HUB_OFFLINE is set; unset it where there is a network"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise Fault(
            f"{setting} cannot be fetched ({first_line(error)}); try again where there is a network, or name a folder "
            "you have copied"
        ) from error
    total = size(sum(file.size for file in files))
    state = "fetched" if missing else "was there already"
    return f"{setting}: {state}, {total} in {len(files)} files, {folder}"


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def size(count: int) -> str:
    """Bytes as a person reads them."""
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"
